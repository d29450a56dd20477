#include "spmm.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace saefast {
namespace {

// Rows lie far apart, where the hardware sees each one's start too late: while one is summed, a later one is prefetched,
// line by line. Four rows of fp32 ahead, or eight of 16 bits.
template <class Type>
constexpr int64_t kRowsAhead = 16 / static_cast<int64_t>(sizeof(typename Type::Stored));
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

// The row to prefetch while entry `e` is worked on; near the end one that was read already.
template <class Type>
const typename Type::Stored* row_ahead(const Gathered& code, int64_t e, int64_t end) {
    const int64_t later = e + kRowsAhead<Type>;
    return reinterpret_cast<const typename Type::Stored*>(row_at(code, later < end ? later : e));
}

// sum += Σ a[j] · w[j] over N rows, so that sum is loaded and stored once for all of them.
template <class Type, int N>
inline __attribute__((always_inline)) void add_rows(const typename Type::Stored* const* w,
                                                    const typename Type::Stored* const* ahead, const float* a,
                                                    int64_t d, float* __restrict sum) {
    constexpr int64_t step = kLine / static_cast<int64_t>(sizeof(typename Type::Stored));
    int64_t i = 0;
    for (; i + step <= d; i += step) {
        for (int j = 0; j < N; ++j) __builtin_prefetch(ahead[j] + i);
        for (int64_t lane = i; lane < i + step; ++lane) {
            float s = sum[lane];
            for (int j = 0; j < N; ++j) s += a[j] * Type::read(w[j][lane]);
            sum[lane] = s;
        }
    }
    for (; i < d; ++i)
        for (int j = 0; j < N; ++j) sum[i] += a[j] * Type::read(w[j][i]);
}

template <class Type>
inline __attribute__((always_inline)) void spmm_rows(const Gathered& code, const float* acts, float* out, int64_t begin,
                                                     int64_t end) {
    using Stored = typename Type::Stored;
    for (int64_t b = begin; b < end; ++b) {
        float* sum = out + b * code.d;
        std::fill(sum, sum + code.d, 0.0f);
        const int64_t last = (b + 1) * code.k;
        for (int64_t e = b * code.k; e < last; e += 4) {
            const Stored *rows[4], *ahead[4];
            const int64_t n = std::min<int64_t>(4, last - e);
            for (int64_t j = 0; j < n; ++j) {
                rows[j] = reinterpret_cast<const Stored*>(row_at(code, e + j));
                ahead[j] = row_ahead<Type>(code, e + j, end * code.k);
            }
            if (n == 4)
                add_rows<Type, 4>(rows, ahead, acts + e, code.d, sum);
            else
                for (int64_t j = 0; j < n; ++j) add_rows<Type, 1>(rows + j, ahead + j, acts + e + j, code.d, sum);
        }
    }
}

template <class Type>
inline __attribute__((always_inline)) float dot(const typename Type::Stored* w, const typename Type::Stored* ahead,
                                                const float* x, int64_t d) {
    constexpr int64_t per_line = kLine / static_cast<int64_t>(sizeof(typename Type::Stored));
    float part[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        for (int64_t line = 0; line < kLanes; line += per_line) __builtin_prefetch(ahead + i + line);
        for (int64_t lane = 0; lane < kLanes; ++lane) part[lane] += Type::read(w[i + lane]) * x[i + lane];
    }
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
            const auto* row = reinterpret_cast<const typename Type::Stored*>(row_at(code, e));
            out[e] = dot<Type>(row, row_ahead<Type>(code, e, end * code.k), x + b * code.d, code.d);
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
