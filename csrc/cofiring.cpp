#include "cofiring.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "threads.hpp"

namespace saefast {
namespace {

// Rows ahead of the one that is counted, whose entries are asked for from memory: a latent's rows lie far apart.
constexpr int64_t kAhead = 12;
constexpr int64_t kPiece = 1 << 16;

struct Pair {
    double rank;
    int32_t latent;
    int32_t count;
};

bool before(const Pair& a, const Pair& b) { return a.rank != b.rank ? a.rank > b.rank : a.latent < b.latent; }

void check_pointers(const char* name, const int64_t* pointers, int64_t n) {
    if (pointers[0] != 0) throw std::invalid_argument(std::string(name) + " does not begin at 0");
    for (int64_t i = 0; i < n; ++i)
        if (pointers[i + 1] < pointers[i])
            throw std::invalid_argument(std::string(name) + "[" + std::to_string(i + 1) + "] is less than the one before");
}

template <class T>
void check_numbers(const char* name, const T* numbers, int64_t n, int64_t limit, int n_threads) {
    const auto check = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            if (numbers[i] < 0 || numbers[i] >= limit)
                throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] is " +
                                        std::to_string(numbers[i]) + ", outside [0, " + std::to_string(limit) + ")");
    };
    parallel_for(n, n_threads, check, kPiece);
}

// Counts for one latent after the other, on one thread.
class Counter {
public:
    Counter(const CodeOfRows& code, const PairRank& rank, int64_t best)
        : code_(code), rank_(rank), best_(static_cast<size_t>(best)),
          count_(static_cast<size_t>(code.n_latents)) {}

    // The best others of `latent`, which fires on n rows.
    const std::vector<Pair>& of(int32_t latent, const int64_t* rows, int64_t n, double least) {
        for (int64_t i = 0; i < n; ++i) {
            if (i + kAhead < n) __builtin_prefetch(code_.row_ptr + rows[i + kAhead]);
            if (i + kAhead / 2 < n) __builtin_prefetch(code_.idx + code_.row_ptr[rows[i + kAhead / 2]]);
            for (int64_t e = code_.row_ptr[rows[i]]; e < code_.row_ptr[rows[i] + 1]; ++e) meet(code_.idx[e]);
        }
        found_.clear();
        for (const int32_t other : met_) {
            const int32_t count = std::exchange(count_[static_cast<size_t>(other)], 0);
            if (other != latent) consider(other, std::min<int64_t>(count, rank_.longest), least);
        }
        met_.clear();
        return found_;
    }

private:
    void meet(int32_t other) {
        if (count_[static_cast<size_t>(other)]++ == 0) met_.push_back(other);
    }

    void consider(int32_t other, int64_t count, double least) {
        const Pair pair{rank_.worth[count] / static_cast<double>(rank_.n_fired[other]), other,
                        static_cast<int32_t>(count)};
        if (!(pair.rank > least)) return;
        if (found_.size() == best_) {
            if (!before(pair, found_.back())) return;
            found_.pop_back();
        }
        found_.insert(std::upper_bound(found_.begin(), found_.end(), pair, before), pair);
    }

    const CodeOfRows& code_;
    const PairRank& rank_;
    size_t best_;
    std::vector<int32_t> count_, met_;
    std::vector<Pair> found_;
};

}  // namespace

void cofiring(const CodeOfRows& code, const RowsOfLatents& latents, const PairRank& rank, int64_t best, int32_t* ids,
              int64_t* counts, int n_threads) {
    check_pointers("row_ptr", code.row_ptr, code.n_rows);
    check_pointers("ptr", latents.ptr, latents.n);
    int64_t longest = 0;
    for (int64_t i = 0; i < latents.n; ++i) longest = std::max(longest, latents.ptr[i + 1] - latents.ptr[i]);
    if (rank.longest != longest)
        throw std::invalid_argument("worth is for up to " + std::to_string(rank.longest) + " rows: expected up to " +
                                    std::to_string(longest));
    check_numbers("idx", code.idx, code.row_ptr[code.n_rows], code.n_latents, n_threads);
    check_numbers("row", latents.row, latents.ptr[latents.n], code.n_rows, n_threads);
    if (latents.first < 0 || latents.n > code.n_latents - latents.first)
        throw std::out_of_range("there are no latents " + std::to_string(latents.first) + " to " +
                                std::to_string(latents.first + latents.n));
    if (best < 1) return;
    const auto count = [&](int64_t begin, int64_t end) {
        Counter counter(code, rank, best);
        for (int64_t i = begin; i < end; ++i) {
            const auto& found = counter.of(static_cast<int32_t>(latents.first + i), latents.row + latents.ptr[i],
                                           latents.ptr[i + 1] - latents.ptr[i], rank.least[i]);
            for (int64_t place = 0; place < best; ++place) {
                const bool there = place < static_cast<int64_t>(found.size());
                ids[i * best + place] = there ? found[static_cast<size_t>(place)].latent : -1;
                counts[i * best + place] = there ? found[static_cast<size_t>(place)].count : 0;
            }
        }
    };
    parallel_for(latents.n, n_threads, count, 16);
}

}  // namespace saefast
