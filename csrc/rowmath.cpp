#include "rowmath.hpp"

#include <cmath>
#include <cstring>

namespace saefast::rowmath {
namespace {

// Independent partial sums: enough to hide the latency of an FMA at any vector width, and a fixed order everywhere.
constexpr int kLanes = 64;

}  // namespace

SAEFAST_ROW_CLONES
float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
    float sum[kLanes] = {0};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) sum[l] += a[i + l] * b[i + l];
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum[0] + rest;
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

}  // namespace saefast::rowmath
