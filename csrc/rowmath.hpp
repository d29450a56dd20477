// The inner loops over one row, compiled once per instruction set. Plain arrays of fixed length instead of intrinsics:
// the compiler turns each into registers, and the order of every sum stays the one written here.
#pragma once

#include <cstdint>

// x86-64-v3 rather than avx2: it has FMA, which Adam's arithmetic is defined with (see adam_elements).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SAEFAST_ROW_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SAEFAST_ROW_CLONES
#endif

namespace saefast::rowmath {

// a · b
float dot(const float* a, const float* b, int64_t n);
// acc += c · x
void add_scaled(float* acc, const float* x, float c, int64_t n);
// The same with x in bf16.
float dot(const float* a, const uint16_t* b, int64_t n);
void add_scaled(float* acc, const uint16_t* x, float c, int64_t n);
// acc += x
void add(float* acc, const float* x, int64_t n);
// x /= by
void divide(float* x, float by, int64_t n);
// x *= by
void scale(float* x, float by, int64_t n);
// out = a - b
void subtract(float* out, const float* a, const float* b, int64_t n);
// Σ (x - mean)² and Σ x² added in double to *variance and *squares
void add_moments(const float* x, const double* mean, int64_t n, double* variance, double* squares);
// sums += x, in double
void add_to_double(double* sums, const float* x, int64_t n);
// dst = x rounded to bf16 (nearest, ties to even)
void to_bf16(uint16_t* dst, const float* x, int64_t n);

// Constants of one Adam step in the precisions torch uses them in.
struct AdamConstants {
    float lerp_weight;     // 1 - beta1
    float beta2;
    float one_minus_beta2;
    float root_correction;  // √(1 - beta2^t)
    float eps;
    float minus_step_size;  // -lr / (1 - beta1^t)
};

// One Adam update of n elements, bit for bit what torch.optim.Adam(fused=True) does on a CPU.
void adam_elements(float* w, float* m, float* v, const float* grad, int64_t n, const AdamConstants& c);

// Settles n elements that missed some steps: w -= drift · m / (√v + drift_eps), m *= m_decay, v *= v_decay.
void drift_elements(float* w, float* m, float* v, int64_t n, float drift, float drift_eps, float m_decay, float v_decay);

// The lean optimiser. Random bits are a hash of key + column.
void from_bf16(float* dst, const uint16_t* x, int64_t n);
void to_bf16_stochastic(uint16_t* dst, const float* x, uint32_t key, int64_t n);
void from_int8(float* dst, const int8_t* q, float scale, int64_t n);
// dst = x / scale rounded stochastically, for columns first .. first + n of a row; inverse is 1 / scale.
void to_int8_stochastic(int8_t* dst, const float* x, float inverse, uint32_t key, int64_t first, int64_t n);
float abs_max(const float* x, int64_t n);
// m = lerp(m, grad), w += factor · m
void lean_elements(float* w, float* m, const float* grad, int64_t n, float lerp_weight, float factor);

// An integer hash (Wellons 2018, "lowbias32"): every bit of the result depends on every bit of x.
inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

}  // namespace saefast::rowmath
