#include "rowmath.hpp"

#include <cmath>
#include <cstring>

namespace saefast::rowmath {
namespace {

// Independent partial sums: enough to hide the latency of an FMA at any vector width, and a fixed order everywhere.
constexpr int kLanes = 64;

inline float widened(float x) { return x; }

inline float widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
__attribute__((always_inline)) inline float dot_of(const float* __restrict a, const T* __restrict b, int64_t n) {
    float sum[kLanes] = {0};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) sum[l] += a[i + l] * widened(b[i + l]);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * widened(b[i]);
    return sum[0] + rest;
}

inline uint32_t random_bits(uint32_t key, int64_t column) {
    return mix(key + static_cast<uint32_t>(column) * 0x9E3779B9u);
}

}  // namespace

SAEFAST_ROW_CLONES
float dot(const float* a, const float* b, int64_t n) { return dot_of(a, b, n); }

SAEFAST_ROW_CLONES
float dot(const float* a, const uint16_t* b, int64_t n) { return dot_of(a, b, n); }

SAEFAST_ROW_CLONES
void add_scaled(float* __restrict acc, const uint16_t* __restrict x, float c, int64_t n) {
    for (int64_t i = 0; i < n; ++i) acc[i] += c * widened(x[i]);
}

SAEFAST_ROW_CLONES
void add_scaled(float* __restrict acc, const float* __restrict x, float c, int64_t n) {
    for (int64_t i = 0; i < n; ++i) acc[i] += c * x[i];
}

SAEFAST_ROW_CLONES
void add(float* __restrict acc, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) acc[i] += x[i];
}

SAEFAST_ROW_CLONES
void divide(float* x, float by, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] /= by;
}

SAEFAST_ROW_CLONES
void scale(float* x, float by, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] *= by;
}

SAEFAST_ROW_CLONES
void subtract(float* __restrict out, const float* __restrict a, const float* __restrict b, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

SAEFAST_ROW_CLONES
void add_moments(const float* __restrict x, const double* __restrict mean, int64_t n, double* variance,
                 double* squares) {
    double var[8] = {0}, sq[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; ++l) {
            const double value = x[i + l], centred = value - mean[i + l];
            var[l] += centred * centred;
            sq[l] += value * value;
        }
    for (; i < n; ++i) {
        const double value = x[i], centred = value - mean[i];
        var[0] += centred * centred;
        sq[0] += value * value;
    }
    for (int l = 0; l < 8; ++l) {
        *variance += var[l];
        *squares += sq[l];
    }
}

SAEFAST_ROW_CLONES
void add_to_double(double* __restrict sums, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
}

SAEFAST_ROW_CLONES
void to_bf16(uint16_t* __restrict dst, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        dst[i] = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
}

SAEFAST_ROW_CLONES
void adam_elements(float* __restrict w, float* __restrict m, float* __restrict v, const float* __restrict grad,
                   int64_t n, const AdamConstants& constants) {
    const AdamConstants c = constants;
    // torch's lerp starts from the nearer end, which decides how the last bit rounds.
    const bool near_m = c.lerp_weight < 0.5f;
    const float weight = near_m ? c.lerp_weight : c.lerp_weight - 1.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float g = grad[i];
        const float m_new = std::fma(weight, g - m[i], near_m ? m[i] : g);
        const float v_new = std::fma(c.one_minus_beta2 * g, g, v[i] * c.beta2);
        m[i] = m_new;
        v[i] = v_new;
        w[i] += (c.minus_step_size * m_new) / (std::sqrt(v_new) / c.root_correction + c.eps);
    }
}

SAEFAST_ROW_CLONES
void drift_elements(float* __restrict w, float* __restrict m, float* __restrict v, int64_t n, float drift,
                    float drift_eps, float m_decay, float v_decay) {
    for (int64_t i = 0; i < n; ++i) {
        w[i] -= drift * m[i] / (std::sqrt(v[i]) + drift_eps);
        m[i] *= m_decay;
        v[i] *= v_decay;
    }
}

SAEFAST_ROW_CLONES
void from_bf16(float* __restrict dst, const uint16_t* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = widened(x[i]);
}

SAEFAST_ROW_CLONES
void to_bf16_stochastic(uint16_t* __restrict dst, const float* __restrict x, uint32_t key, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        dst[i] = static_cast<uint16_t>((bits + (random_bits(key, i) & 0xFFFFu)) >> 16);
    }
}

SAEFAST_ROW_CLONES
void from_int8(float* __restrict dst, const int8_t* __restrict q, float scale, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = scale * static_cast<float>(q[i]);
}

SAEFAST_ROW_CLONES
void to_int8_stochastic(int8_t* __restrict dst, const float* __restrict x, float inverse, uint32_t key, int64_t first,
                        int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float uniform = static_cast<float>(random_bits(key, first + i) >> 16) * 0x1p-16f;
        // Rounding down by way of a positive number: x / scale lies in [-127, 127].
        const int32_t q = static_cast<int32_t>(x[i] * inverse + uniform + 128.0f) - 128;
        dst[i] = static_cast<int8_t>(q > 127 ? 127 : q < -127 ? -127 : q);
    }
}

SAEFAST_ROW_CLONES
float abs_max(const float* __restrict x, int64_t n) {
    float most[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; ++l) most[l] = std::fabs(x[i + l]) > most[l] ? std::fabs(x[i + l]) : most[l];
    float result = 0;
    for (; i < n; ++i) result = std::fabs(x[i]) > result ? std::fabs(x[i]) : result;
    for (float value : most) result = value > result ? value : result;
    return result;
}

SAEFAST_ROW_CLONES
void lean_elements(float* __restrict w, float* __restrict m, const float* __restrict grad, int64_t n,
                   float lerp_weight, float factor) {
    for (int64_t i = 0; i < n; ++i) {
        m[i] += lerp_weight * (grad[i] - m[i]);
        w[i] += factor * m[i];
    }
}

}  // namespace saefast::rowmath
