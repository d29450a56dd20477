#include "topk.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "keys.hpp"
#include "threads.hpp"

namespace saefast {
namespace {

// A row's list is cut back to k entries when it holds 4k: every cut raises the bound, and costs about one pass over the
// list. Lists that fill up faster than every second latent (ascending rows) may grow longer, so that cuts stay rare.
constexpr int64_t kCutAt = 4;
constexpr int64_t kShortestCut = 64;
constexpr int64_t kLongestCut = 512;
// The shortest range of latents that a thread gets, over k: from a shorter one it would keep most of what it sees.
constexpr int64_t kRangePerK = 16;

// A candidate. Without a scale, the key holds its value too.
struct Plain {
    uint64_t key;
    static Plain make(float /*pre*/, float rank, int64_t id) { return {key_of(rank, id)}; }
    float pre() const { return rank_of(key); }
};

struct Scaled {
    uint64_t key;
    float value;
    static Scaled make(float pre, float rank, int64_t id) { return {key_of(rank, id), pre}; }
    float pre() const { return value; }
};

constexpr auto better = [](const auto& a, const auto& b) { return a.key > b.key; };

// A pivot with about `k` of the n entries before it, or somewhat more: read off a sorted sample.
template <class Entry>
Entry pivot_near(const Entry* list, int64_t n, int64_t k) {
    constexpr int64_t kSample = 24;
    Entry sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = list[i * n / kSample];
    const int64_t at = std::min(kSample - 1, k * kSample / n + 1);
    std::nth_element(sample, sample + at, sample + kSample, better);
    return sample[at];
}

// Moves the k best of list[0, n) to its front, in no order; 1 <= k <= n. spare has room for n. Quickselect whose passes
// do not branch on the data, which is what most of the time goes into otherwise; after a few, std::nth_element is safe.
template <class Entry>
void keep_best(Entry* list, int64_t n, int64_t k, Entry* spare) {
    for (int pass = 0; pass < 4 && n > k && n > 64; ++pass) {
        const uint64_t pivot = pivot_near(list, n, k).key;
        Entry *front = list, *back = spare;
        for (const Entry* entry = list; entry != list + n; ++entry) {
            const Entry copy = *entry;
            *front = copy;
            *back = copy;
            front += copy.key >= pivot;
            back += copy.key < pivot;
        }
        const int64_t found = front - list;
        if (found >= k) {
            n = found;
            continue;
        }
        std::copy(spare, back, front);
        list = front;
        n -= found;
        k -= found;
    }
    if (k < n) std::nth_element(list, list + k, list + n, better);
}

int64_t list_capacity(int64_t k, int64_t n_ids) {
    const int64_t longest = std::max(kLongestCut, kCutAt * k);
    return std::min(longest, n_ids) + kMaxTileLatents;
}

// The running top-k of some rows over some range of latents.
template <class Entry>
class Best final : public Sink {
  public:
    Best(int64_t first_block, int64_t n_blocks, int64_t block_rows, int64_t k, int64_t n_ids)
        : first_row_(first_block * block_rows),
          block_rows_(block_rows),
          k_(k),
          capacity_(list_capacity(k, n_ids)),
          shortest_cut_(std::min(std::max(kShortestCut, kCutAt * k), capacity_ - kMaxTileLatents)),
          entries_(new Entry[static_cast<size_t>(n_blocks * block_rows * capacity_)]),
          spare_(new Entry[static_cast<size_t>(capacity_)]),
          rows_(static_cast<size_t>(n_blocks * block_rows), Row{0, shortest_cut_, 0}),
          // Nothing is <= NaN: until k are known, everything passes.
          bounds_(rows_.size(), std::numeric_limits<float>::quiet_NaN()) {}

    const float* row_bounds(int64_t block) override { return bounds_.data() + block * block_rows_ - first_row_; }

    void take(const Found& found) override {
        for (uint32_t rest = found.rows; rest != 0; rest &= rest - 1) {
            const int r = __builtin_ctz(rest);
            append(found, r, found.block * block_rows_ + r - first_row_);
        }
    }

    // The best entries of a row, in no order, at most k.
    std::pair<const Entry*, int64_t> best(int64_t row) {
        const int64_t at = row - first_row_;
        if (rows_[static_cast<size_t>(at)].n > k_) cut(at);
        return {entries_.get() + at * capacity_, rows_[static_cast<size_t>(at)].n};
    }

  private:
    struct Row {
        int64_t n, cut_at, seen_at_cut;
    };

    void append(const Found& found, int r, int64_t at) {
        Row& row = rows_[static_cast<size_t>(at)];
        const float bound = bounds_[static_cast<size_t>(at)];
        uint32_t beats = 0;
        for (int i = 0; i < found.n; ++i)
            beats |= static_cast<uint32_t>(!(found.pre[i * found.stride + r] * found.scale[i] <= bound)) << i;
        Entry* list = entries_.get() + at * capacity_;
        for (; beats != 0; beats &= beats - 1) {
            const int i = __builtin_ctz(beats);
            const float pre = found.pre[i * found.stride + r];
            list[row.n++] = Entry::make(pre, pre * found.scale[i], found.ids[i]);
        }
        if (row.n < row.cut_at) return;
        const int64_t seen = found.position + found.n;
        const bool flooded = 2 * (row.n - k_) > seen - row.seen_at_cut;
        row.cut_at = flooded ? std::min(2 * row.cut_at, capacity_ - kMaxTileLatents) : shortest_cut_;
        row.seen_at_cut = seen;
        cut(at);
    }

    void cut(int64_t at) {
        Entry* list = entries_.get() + at * capacity_;
        Row& row = rows_[static_cast<size_t>(at)];
        keep_best(list, row.n, k_, spare_.get());
        row.n = k_;
        const Entry* last = std::max_element(list, list + k_, better);
        bounds_[static_cast<size_t>(at)] = rank_of(last->key);
    }

    int64_t first_row_, block_rows_, k_, capacity_, shortest_cut_;
    std::unique_ptr<Entry[]> entries_, spare_;
    std::vector<Row> rows_;
    std::vector<float> bounds_;
};

// Merges what each range found of one row, and writes the row.
template <class Entry>
void write_row(const std::unique_ptr<Best<Entry>>* ranges, int64_t n_ranges, int64_t row, const TopK& options,
               float* acts, int32_t* idx, std::vector<Entry>& merged) {
    merged.clear();
    for (int64_t i = 0; i < n_ranges; ++i) {
        const auto [list, n] = ranges[i]->best(row);
        merged.insert(merged.end(), list, list + n);
    }
    std::partial_sort(merged.begin(), merged.begin() + options.k, merged.end(), better);
    for (int64_t j = 0; j < options.k; ++j) {
        const Entry& entry = merged[static_cast<size_t>(j)];
        const float pre = entry.pre();
        acts[j] = options.relu && pre < 0.0f ? 0.0f : pre;
        idx[j] = id_of(entry.key);
    }
}

template <class Entry>
void encode_rows(const Encoder& e, const TileKernel& kernel, const TopK& options, int64_t first_row, int64_t n_rows,
                 float* acts, int32_t* idx) {
    const PackedRows x(e, kernel, first_row, n_rows, options.n_threads);
    const Split split = split_work(x.n_blocks(), e.n_ids, kRangePerK * options.k, options.n_threads);
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < split.row_parts * split.ranges; ++i)
        pieces.push_back(piece_of(split, i, x.n_blocks(), e.n_ids));
    std::vector<std::unique_ptr<Best<Entry>>> best(pieces.size());
    auto run = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Piece& piece = pieces[static_cast<size_t>(i)];
            auto& mine = best[static_cast<size_t>(i)];
            const int64_t n_blocks = piece.last_block - piece.first_block;
            mine.reset(new Best<Entry>(piece.first_block, n_blocks, kernel.rows, options.k, e.n_ids));
            visit_tiles(e, kernel, x, piece.first_block, piece.last_block, piece.first, piece.last, *mine);
        }
    };
    parallel_for(static_cast<int64_t>(pieces.size()), options.n_threads, run);

    auto write = [&](int64_t begin, int64_t end) {
        std::vector<Entry> merged;
        for (int64_t part = begin; part < end; ++part) {
            auto* ranges = best.data() + part * split.ranges;
            const Piece& piece = pieces[static_cast<size_t>(part * split.ranges)];
            const int64_t last = std::min(n_rows, piece.last_block * kernel.rows);
            for (int64_t row = piece.first_block * kernel.rows; row < last; ++row)
                write_row(ranges, split.ranges, row, options, acts + row * options.k, idx + row * options.k, merged);
        }
    };
    parallel_for(split.row_parts, options.n_threads, write);
}

// Rows whose packed x and lists fit the scratch, at least one block.
template <class Entry>
int64_t rows_at_once(const Encoder& e, const TileKernel& kernel, const TopK& options) {
    const int64_t depth = packed_depth(e.d_in, kernel), threads = resolve_threads(options.n_threads);
    const int64_t list = list_capacity(options.k, e.n_ids) * static_cast<int64_t>(sizeof(Entry));
    const int64_t room = options.max_scratch_bytes - threads * chunk_bytes(depth, kernel);
    // Where blocks are few, threads share rows and each keeps lists of its own.
    auto bytes = [&](int64_t blocks) {
        const Split split = split_work(blocks, e.n_ids, kRangePerK * options.k, options.n_threads);
        return blocks * kernel.rows * (4 * depth + split.ranges * (list + 32));
    };
    int64_t blocks = std::max<int64_t>(1, (e.n_rows + kernel.rows - 1) / kernel.rows);
    while (blocks > 1 && bytes(blocks) > room) blocks = blocks * 3 / 4;
    return blocks * kernel.rows;
}

template <class Entry>
void encode_all(const Encoder& e, const TopK& options, float* acts, int32_t* idx) {
    const TileKernel& kernel = pick_tile_kernel(e.type == Float::bf16, e.n_rows, options.kernel);
    const int64_t step = rows_at_once<Entry>(e, kernel, options);
    for (int64_t row = 0; row < e.n_rows; row += step)
        encode_rows<Entry>(e, kernel, options, row, std::min(step, e.n_rows - row), acts + row * options.k,
                           idx + row * options.k);
}

}  // namespace

void encode_topk(const Encoder& e, const TopK& options, float* acts, int32_t* idx) {
    check_ids(e);
    if (options.k < 1 || options.k > e.n_ids)
        throw std::invalid_argument("k is " + std::to_string(options.k) + ", outside [1, " +
                                    std::to_string(e.n_ids) + "]");
    if (e.scale == nullptr)
        encode_all<Plain>(e, options, acts, idx);
    else
        encode_all<Scaled>(e, options, acts, idx);
}

}  // namespace saefast
