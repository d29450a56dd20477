// What the row-wise optimisers share: summing a group, dealing rows to threads, the constants of a step.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rowmath.hpp"
#include "rows.hpp"
#include "threads.hpp"

namespace saefast::detail {

constexpr int64_t kPiece = 256;
// Work besides the entries that a row costs, in units of one entry: weights and state are read and written.
constexpr int64_t kRowCost = 6;
constexpr int64_t kBytesAhead = 256;

inline int64_t row_at(const int32_t* rows, int64_t i) { return rows == nullptr ? i : rows[i]; }

inline void sum_entries(const RowGradient& g, int64_t begin, int64_t end, int64_t d, float* out) {
    std::fill(out, out + d, 0.0f);
    for (int64_t e = begin; e < end; ++e) {
        rowmath::add_scaled(out, g.source + g.row[e] * d, g.coef[e], d);
    }
}

// The sums of the pieces of all groups longer than kPiece, computed by all threads before rows are handed out.
struct Pieces {
    struct Piece {
        int64_t begin, end;
    };
    std::vector<int64_t> first;  // per group: number of its first piece, -1 for short ones
    std::vector<Piece> pieces;
    std::vector<float> sums;

    Pieces(const RowGradient& g, int64_t n, int64_t d, int n_threads) {
        if (g.offsets == nullptr) return;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t begin = g.offsets[i], end = g.offsets[i + 1];
            if (end - begin <= kPiece) continue;
            if (first.empty()) first.assign(static_cast<size_t>(n), -1);
            first[static_cast<size_t>(i)] = static_cast<int64_t>(pieces.size());
            for (int64_t at = begin; at < end; at += kPiece) pieces.push_back({at, std::min(at + kPiece, end)});
        }
        sums.resize(pieces.size() * static_cast<size_t>(d));
        parallel_for(static_cast<int64_t>(pieces.size()), n_threads, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p) {
                const Piece& piece = pieces[static_cast<size_t>(p)];
                sum_entries(g, piece.begin, piece.end, d, sums.data() + p * d);
            }
        });
    }

    // The gradient of group i, in `out`.
    void gradient(const RowGradient& g, int64_t i, int64_t d, float* out) const {
        if (g.offsets == nullptr) return std::fill(out, out + d, 0.0f), void();
        if (first.empty() || first[static_cast<size_t>(i)] < 0)
            return sum_entries(g, g.offsets[i], g.offsets[i + 1], d, out);
        const int64_t count = (g.offsets[i + 1] - g.offsets[i] + kPiece - 1) / kPiece;
        const float* at = sums.data() + first[static_cast<size_t>(i)] * d;
        std::copy(at, at + d, out);
        for (int64_t p = 1; p < count; ++p) rowmath::add(out, at + p * d, d);
    }
};

// Rows cut into one share per thread with about equal work, so that a few busy latents do not hold up the rest.
inline std::vector<int64_t> equal_shares(int64_t n, const int32_t* offsets, int n_threads) {
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(resolve_threads(n_threads), n / 16));
    const auto cost = [&](int64_t i) { return i * kRowCost + (offsets == nullptr ? 0 : offsets[i] - offsets[0]); };
    std::vector<int64_t> cut(static_cast<size_t>(shares + 1), n);
    cut[0] = 0;
    for (int64_t s = 1; s < shares; ++s) {
        int64_t low = cut[static_cast<size_t>(s - 1)], high = n;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (cost(middle) < cost(n) / shares * s)
                low = middle + 1;
            else
                high = middle;
        }
        cut[static_cast<size_t>(s)] = low;
    }
    return cut;
}

// fn(share, begin, end) for every share, each on its own thread.
template <class Fn>
void for_shares(const std::vector<int64_t>& cut, const Fn& fn) {
    const int64_t shares = static_cast<int64_t>(cut.size()) - 1;
    parallel_for(shares, static_cast<int>(shares), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) fn(s, cut[static_cast<size_t>(s)], cut[static_cast<size_t>(s + 1)]);
    });
}

inline rowmath::AdamConstants constants(const AdamStep& s) {
    const double correction1 = 1 - std::pow(s.beta1, s.step), correction2 = 1 - std::pow(s.beta2, s.step);
    return {static_cast<float>(1 - s.beta1),
            static_cast<float>(s.beta2),
            static_cast<float>(1 - s.beta2),
            static_cast<float>(std::sqrt(correction2)),
            static_cast<float>(s.eps),
            static_cast<float>(-(s.lr / correction1))};
}

inline void to_unit_norm(float* w, int64_t d) {
    rowmath::divide(w, std::max(std::sqrt(rowmath::dot(w, w, d)), 1.1920929e-7f), d);
}

// grad -= (grad · w / w · w) w: what is left turns the row without changing its length.
inline void project_out(float* grad, const float* w, int64_t d) {
    const float along = rowmath::dot(grad, w, d) / std::max(rowmath::dot(w, w, d), 1.17549435e-38f);
    rowmath::add_scaled(grad, w, -along, d);
}

// Adds the part of gradient row i along its weights w.
inline void add_along(const RowGradient& g, int64_t i, const float* w, int64_t d, float* grad) {
    if (g.along == nullptr) return;
    const int64_t width = d / g.blocks;
    for (int64_t b = 0; b < g.blocks; ++b)
        rowmath::add_scaled(grad + b * width, w + b * width, g.along[i * g.blocks + b], width);
}

// Asks for the first lines of a row's weights and state before they are needed; the hardware sees the rest coming. A
// pass over all rows takes a third of the time it takes without.
inline void prefetch_bytes(const void* row, int64_t bytes) {
    const char* at = static_cast<const char*>(row);
    for (int64_t b = 0; b < std::min(bytes, kBytesAhead); b += 64) __builtin_prefetch(at + b, 1);
}

inline void prefetch_state(const AdamMatrix& a, int64_t r) {
    for (const float* base : {a.w, a.m, a.v}) prefetch_bytes(base + r * a.d, 4 * a.d);
}

inline void prefetch_state(const LeanMatrix& a, int64_t r) {
    prefetch_bytes(a.w + r * a.d, 2 * a.d);
    prefetch_bytes(a.m + r * a.d, a.d);
}

// A job with everything it needs to run without asking for memory again.
template <class Job>
struct Prepared {
    const Job& job;
    Pieces pieces;
    std::vector<int64_t> cut;
    std::vector<float> buffers;  // Job::kBuffers rows per share, the first for the gradient

    Prepared(const Job& j, int n_threads)
        : job(j),
          pieces(j.gradient, j.n, j.matrix.d, n_threads),
          cut(equal_shares(j.n, j.gradient.offsets, n_threads)),
          buffers((cut.size() - 1) * static_cast<size_t>(Job::kBuffers * j.matrix.d)) {}

    // fn(i, buffer) for every row of the job, the buffer beginning with its gradient row.
    template <class Fn>
    void run(const Fn& fn) {
        for_shares(cut, [&](int64_t share, int64_t begin, int64_t end) {
            float* grad = buffers.data() + share * Job::kBuffers * job.matrix.d;
            for (int64_t i = begin; i < end; ++i) {
                if (i + 1 < end) prefetch_state(job.matrix, row_at(job.rows, i + 1));
                pieces.gradient(job.gradient, i, job.matrix.d, grad);
                fn(i, grad);
            }
        });
    }
};

void run_lean(Prepared<LeanJob>& prepared);  // rows_lean.cpp

}  // namespace saefast::detail
