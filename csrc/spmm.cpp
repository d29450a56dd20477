#include "spmm.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace saefast {
namespace {

// Rows lie far apart and the hardware sees each one's start too late.
constexpr int64_t kRowsAhead = 4;
constexpr int64_t kBytesAhead = 512;
constexpr int64_t kLine = 64;
// Starting a thread costs as much as about this many products.
constexpr int64_t kWorkPerThread = 64 * 1024;
// Independent partial sums of a dot product: enough to keep the adders busy, and the rounding error small.
constexpr int64_t kLanes = 64;

template <class Index>
void check_idx(const Gathered& code) {
    const auto* idx = static_cast<const Index*>(code.idx);
    const auto* end = idx + code.n_rows * code.k;
    const auto* bad = std::find_if(idx, end, [&](Index i) {
        return static_cast<uint64_t>(i) >= static_cast<uint64_t>(code.n_latents);
    });
    if (bad == end) return;
    const int64_t at = bad - idx;
    throw std::out_of_range("idx[" + std::to_string(at / code.k) + ", " + std::to_string(at % code.k) + "] is " +
                            std::to_string(*bad) + ", outside [0, " + std::to_string(code.n_latents) + ")");
}

int64_t index_at(const Gathered& code, int64_t entry) {
    if (code.wide_idx) return static_cast<const int64_t*>(code.idx)[entry];
    return static_cast<const int32_t*>(code.idx)[entry];
}

const char* row_at(const Gathered& code, int64_t entry) {
    return static_cast<const char*>(code.W) + index_at(code, entry) * code.d * bytes_of(code.type);
}

void prefetch_row(const Gathered& code, int64_t entry, int64_t end) {
    if (entry >= end) return;
    const char* row = row_at(code, entry);
    const int64_t head = std::min(kBytesAhead, code.d * bytes_of(code.type));
    for (int64_t at = 0; at < head; at += kLine) __builtin_prefetch(row + at);
}

// sum += Σ a[j] · w[j] over four rows, or one: out is loaded and stored once per four.
template <class Type>
inline __attribute__((always_inline)) void add_four(const typename Type::Stored* const* w, const float* a, int64_t d,
                                                    float* __restrict sum) {
    const auto *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
    for (int64_t i = 0; i < d; ++i)
        sum[i] = sum[i] + a0 * Type::read(w0[i]) + a1 * Type::read(w1[i]) + a2 * Type::read(w2[i]) + a3 * Type::read(w3[i]);
}

template <class Type>
inline __attribute__((always_inline)) void add_one(const typename Type::Stored* w, float a, int64_t d,
                                                   float* __restrict sum) {
    for (int64_t i = 0; i < d; ++i) sum[i] = sum[i] + a * Type::read(w[i]);
}

template <class Type>
inline __attribute__((always_inline)) void spmm_rows(const Gathered& code, const float* acts, float* out, int64_t begin,
                                                     int64_t end) {
    using Stored = typename Type::Stored;
    for (int64_t b = begin; b < end; ++b) {
        float* sum = out + b * code.d;
        std::fill(sum, sum + code.d, 0.0f);
        const int64_t first = b * code.k, last = first + code.k;
        int64_t e = first;
        for (; e + 4 <= last; e += 4) {
            const Stored* rows[4];
            for (int64_t j = 0; j < 4; ++j) {
                rows[j] = reinterpret_cast<const Stored*>(row_at(code, e + j));
                prefetch_row(code, e + j + kRowsAhead, end * code.k);
            }
            add_four<Type>(rows, acts + e, code.d, sum);
        }
        for (; e < last; ++e) add_one<Type>(reinterpret_cast<const Stored*>(row_at(code, e)), acts[e], code.d, sum);
    }
}

template <class Type>
inline __attribute__((always_inline)) float dot(const typename Type::Stored* w, const float* x, int64_t d) {
    float part[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) part[lane] += Type::read(w[i + lane]) * x[i + lane];
    for (int64_t lane = 0; i < d; ++i, ++lane) part[lane] += Type::read(w[i]) * x[i];
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    return part[0];
}

template <class Type>
inline __attribute__((always_inline)) void sddmm_rows(const Gathered& code, const float* x, float* out, int64_t begin,
                                                      int64_t end) {
    for (int64_t b = begin; b < end; ++b)
        for (int64_t e = b * code.k; e < (b + 1) * code.k; ++e) {
            prefetch_row(code, e + kRowsAhead, end * code.k);
            out[e] = dot<Type>(reinterpret_cast<const typename Type::Stored*>(row_at(code, e)), x + b * code.d, code.d);
        }
}

// target_clones works on plain functions only.
using Rows = void(const Gathered&, const float*, float*, int64_t, int64_t);
#define SAEFAST_ROWS(name, op, Type)                                                                             \
    SAEFAST_CLONES void name(const Gathered& code, const float* in, float* out, int64_t begin, int64_t end) { \
        op<Type>(code, in, out, begin, end);                                                                     \
    }
SAEFAST_ROWS(spmm_fp32, spmm_rows, Fp32)
SAEFAST_ROWS(spmm_bf16, spmm_rows, Bf16)
SAEFAST_ROWS(spmm_fp16, spmm_rows, Fp16)
SAEFAST_ROWS(sddmm_fp32, sddmm_rows, Fp32)
SAEFAST_ROWS(sddmm_bf16, sddmm_rows, Bf16)
SAEFAST_ROWS(sddmm_fp16, sddmm_rows, Fp16)
#undef SAEFAST_ROWS

void run(const Gathered& code, Rows* const (&by_type)[3], const float* in, float* out) {
    if (code.k > 0 && code.wide_idx) check_idx<int64_t>(code);
    if (code.k > 0 && !code.wide_idx) check_idx<int32_t>(code);
    Rows* rows = by_type[static_cast<int>(code.type)];
    auto piece = [&](int64_t begin, int64_t end) { rows(code, in, out, begin, end); };
    const int64_t work = std::max<int64_t>(1, code.k * code.d);
    parallel_for(code.n_rows, code.n_threads, piece, (kWorkPerThread + work - 1) / work);
}

}  // namespace

void spmm(const Gathered& code, const float* acts, float* out) {
    run(code, {spmm_fp32, spmm_bf16, spmm_fp16}, acts, out);
}

void sddmm(const Gathered& code, const float* x, float* out) {
    run(code, {sddmm_fp32, sddmm_bf16, sddmm_fp16}, x, out);
}

}  // namespace saefast
