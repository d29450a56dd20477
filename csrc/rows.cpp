#include "rows.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "rowmath.hpp"
#include "threads.hpp"

namespace saefast {
namespace {

constexpr int64_t kBytesAhead = 512;
// Multiplications that are worth a thread.
constexpr int64_t kWorkPerThread = 1 << 20;

// Rows of a matrix in fp32 or bf16.
struct RowsOf {
    const void* base;
    bool bf16;
    int64_t d;

    const float* wide(int64_t r) const { return static_cast<const float*>(base) + r * d; }
    const uint16_t* narrow(int64_t r) const { return static_cast<const uint16_t*>(base) + r * d; }

    void add_scaled(float* acc, int64_t r, float c) const {
        if (bf16)
            rowmath::add_scaled(acc, narrow(r), c, d);
        else
            rowmath::add_scaled(acc, wide(r), c, d);
    }
    float dot(const float* x, int64_t r) const {
        return bf16 ? rowmath::dot(x, narrow(r), d) : rowmath::dot(x, wide(r), d);
    }
    void prefetch(int64_t r) const {
        const int64_t row = d * (bf16 ? 2 : 4), bytes = std::min(row, kBytesAhead);
        const char* at = static_cast<const char*>(base) + r * row;
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b);
    }
};

int64_t prefix_of(const DecodeLoss& a, int64_t entry, int64_t begin) {
    return a.prefixes.of(entry - begin, a.code.idx[entry]);
}

// acc += the entries of row b that prefix p adds to those before it.
void decode_prefix(const DecodeLoss& a, int64_t b, int64_t p, float* acc) {
    const RowsOf W{a.W_dec, a.bf16, a.d};
    const int64_t begin = a.code.begin(b), end = a.code.begin(b + 1);
    for (int64_t entry = begin; entry < end; ++entry) {
        if (entry + 1 < end) W.prefetch(a.code.idx[entry + 1]);
        const float act = a.code.acts[entry];
        if (act != 0.0f && prefix_of(a, entry, begin) == p) W.add_scaled(acc, a.code.idx[entry], act);
    }
}

void decode_row(const DecodeLoss& a, int64_t b, float* acc) {
    const int64_t plane = a.code.B * a.d, P = a.prefixes.P, begin = a.code.begin(b), end = a.code.begin(b + 1);
    const RowsOf W{a.W_dec, a.bf16, a.d};
    float* residual = a.residual + b * a.d;
    if (a.b_dec == nullptr)
        std::fill(acc, acc + a.d, 0.0f);
    else
        std::copy(a.b_dec, a.b_dec + a.d, acc);
    for (int64_t p = 0; p < P; ++p) {
        float* e = residual + p * plane;
        decode_prefix(a, b, p, acc);
        rowmath::subtract(e, a.x + b * a.d, acc, a.d);
        a.squares[p * a.code.B + b] = rowmath::dot(e, e, a.d);
        if (p == a.main && a.error != nullptr) std::copy(e, e + a.d, a.error + b * a.d);
        rowmath::scale(e, a.weight[p], a.d);
    }
    for (int64_t p = P - 2; p >= 0; --p) rowmath::add(residual + p * plane, residual + (p + 1) * plane, a.d);
    for (int64_t entry = begin; entry < end; ++entry) {
        const int64_t p = prefix_of(a, entry, begin);
        const bool off = p >= P || (a.relu && !(a.code.acts[entry] > 0.0f));
        a.grad_acts[entry] = off ? 0.0f : -2.0f * W.dot(residual + p * plane, a.code.idx[entry]);
    }
}

}  // namespace

void decode_loss(const DecodeLoss& a, int n_threads) {
    for (int64_t i = 0; i < a.code.n; ++i)
        if (a.code.idx[i] < 0 || a.code.idx[i] >= a.n_latents)
            throw std::out_of_range("idx[" + std::to_string(i) + "] is " + std::to_string(a.code.idx[i]) +
                                    ", outside [0, " + std::to_string(a.n_latents) + ")");
    std::fill(a.grad_acts + a.code.begin(a.code.B), a.grad_acts + a.code.n, 0.0f);
    const int64_t row_work = a.code.n / std::max<int64_t>(1, a.code.B) * a.d;
    parallel_for(a.code.B, n_threads, [&](int64_t begin, int64_t end) {
        std::vector<float> acc(static_cast<size_t>(a.d));
        for (int64_t b = begin; b < end; ++b) decode_row(a, b, acc.data());
    }, kWorkPerThread / std::max<int64_t>(1, row_work));
}

void weighted_row_sum(const void* base, bool bf16, int64_t d, const int32_t* rows, const float* coef, int64_t n, float* out,
                      int n_threads) {
    constexpr int64_t kBlock = 256;
    const RowsOf W{base, bf16, d};
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    std::vector<float> partial(static_cast<size_t>(blocks * d), 0.0f);
    parallel_for(blocks, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kBlock; i < std::min(n, end * kBlock); ++i) {
            if (rows != nullptr && i + 1 < n) W.prefetch(rows[i + 1]);
            W.add_scaled(partial.data() + i / kBlock * d, rows == nullptr ? i : rows[i],
                         coef == nullptr ? 1.0f : coef[i]);
        }
    }, kWorkPerThread / std::max<int64_t>(1, kBlock * d));
    std::fill(out, out + d, 0.0f);
    for (int64_t block = 0; block < blocks; ++block) rowmath::add(out, partial.data() + block * d, d);
}

void batch_sums(const float* x, int64_t n, int64_t d, double* variance, double* squares, int n_threads) {
    constexpr int64_t kBlock = 64;
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    std::vector<double> sums(static_cast<size_t>(blocks * d), 0.0), mean(static_cast<size_t>(d), 0.0);
    parallel_for(blocks, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kBlock; i < std::min(n, end * kBlock); ++i)
            rowmath::add_to_double(sums.data() + i / kBlock * d, x + i * d, d);
    }, kWorkPerThread / std::max<int64_t>(1, kBlock * d));
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t c = 0; c < d; ++c) mean[static_cast<size_t>(c)] += sums[static_cast<size_t>(block * d + c)];
    for (double& m : mean) m /= static_cast<double>(std::max<int64_t>(n, 1));
    std::vector<double> parts(static_cast<size_t>(2 * blocks), 0.0);
    parallel_for(blocks, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kBlock; i < std::min(n, end * kBlock); ++i)
            rowmath::add_moments(x + i * d, mean.data(), d, &parts[static_cast<size_t>(i / kBlock * 2)],
                                 &parts[static_cast<size_t>(i / kBlock * 2 + 1)]);
    }, kWorkPerThread / std::max<int64_t>(1, kBlock * d));
    *variance = *squares = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        *variance += parts[static_cast<size_t>(2 * block)];
        *squares += parts[static_cast<size_t>(2 * block + 1)];
    }
}

}  // namespace saefast
