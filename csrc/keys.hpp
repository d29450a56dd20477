// A compared value and its latent in one integer.
#pragma once

#include <cstdint>
#include <limits>

#include "floats.hpp"

namespace saefast {

// Orders as the results are ordered: by value, NaN first and -0 equal to 0, then by the lower latent. No two are equal.
inline uint64_t key_of(float rank, int64_t id) {
    uint32_t bits = to_bits(rank + 0.0f);
    bits = rank != rank ? 0xffffffffu : bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
    return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

inline float rank_of(uint64_t key) {
    const auto bits = static_cast<uint32_t>(key >> 32);
    if (bits == 0xffffffffu) return std::numeric_limits<float>::quiet_NaN();
    return from_bits(bits ^ (bits & 0x80000000u ? 0x80000000u : 0xffffffffu));
}

inline int32_t id_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

}  // namespace saefast
