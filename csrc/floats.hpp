// The three float formats tensors arrive in, and their exact conversion to fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace saefast {

enum class Float { fp32 = 0, bf16 = 1, fp16 = 2 };

inline int64_t bytes_of(Float type) { return type == Float::fp32 ? 4 : 2; }

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Tags, so that one template reads all three: Bf16::read(p) of a pointer to Bf16::Stored.
struct Fp32 {
    using Stored = float;
    static float read(float stored) { return stored; }
};

struct Bf16 {
    using Stored = uint16_t;
    static float read(uint16_t stored) { return from_bits(static_cast<uint32_t>(stored) << 16); }
};

struct Fp16 {
    using Stored = uint16_t;
    static float read(uint16_t stored) {
        // Exponent and mantissa moved into fp32's places are the value times 2^-112, subnormals included.
        const uint32_t sign = static_cast<uint32_t>(stored & 0x8000u) << 16, rest = stored & 0x7fffu;
        const uint32_t finite = to_bits(from_bits(rest << 13) * 0x1p112f);
        const uint32_t infinite = 0x7f800000u | (rest << 13);
        return from_bits(sign | (rest >= 0x7c00u ? infinite : finite));
    }
};

}  // namespace saefast
