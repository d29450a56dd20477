#include "group_max.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "keys.hpp"
#include "threads.hpp"

namespace saefast {
namespace {

struct Entry {
    uint64_t key;
    float pre;
};

// The best few entries of some rows in one group after another: short lists, each kept in order.
class Best final : public Sink {
  public:
    Best(int64_t first_block, int64_t n_blocks, int64_t block_rows, int64_t best)
        : first_row_(first_block * block_rows),
          block_rows_(block_rows),
          best_(best),
          entries_(static_cast<size_t>(n_blocks * block_rows * best)),
          counts_(static_cast<size_t>(n_blocks * block_rows)),
          bounds_(counts_.size()) {}

    // Nothing is <= NaN: until a list is full, everything passes.
    void begin_group() {
        std::fill(counts_.begin(), counts_.end(), 0);
        std::fill(bounds_.begin(), bounds_.end(), std::numeric_limits<float>::quiet_NaN());
    }

    const float* row_bounds(int64_t block) override { return bounds_.data() + block * block_rows_ - first_row_; }

    void take(const Found& found) override {
        for (uint32_t rest = found.rows; rest != 0; rest &= rest - 1) {
            const int r = __builtin_ctz(rest);
            const auto at = static_cast<size_t>(found.block * block_rows_ + r - first_row_);
            for (int i = 0; i < found.n; ++i) {
                const float pre = found.pre[i * found.stride + r], rank = pre * found.scale[i];
                if (!(rank <= bounds_[at])) insert(at, {key_of(rank, found.ids[i]), pre});
            }
        }
    }

    void write_group(int64_t row, float* pre, int32_t* idx) const {
        const Entry* list = entries_.data() + (row - first_row_) * best_;
        for (int64_t j = 0; j < best_; ++j) {
            pre[j] = list[j].pre;
            idx[j] = id_of(list[j].key);
        }
    }

  private:
    void insert(size_t at, const Entry& entry) {
        Entry* list = entries_.data() + static_cast<int64_t>(at) * best_;
        const bool full = counts_[at] == best_;
        // Where the bound is NaN it lets through what may not be better.
        if (full && list[best_ - 1].key > entry.key) return;
        int64_t j = full ? best_ - 1 : counts_[at]++;
        for (; j > 0 && list[j - 1].key < entry.key; --j) list[j] = list[j - 1];
        list[j] = entry;
        if (counts_[at] == best_) bounds_[at] = rank_of(list[best_ - 1].key);
    }

    int64_t first_row_, block_rows_, best_;
    std::vector<Entry> entries_;
    std::vector<int64_t> counts_;
    std::vector<float> bounds_;
};

void encode_rows(const Encoder& e, const TileKernel& kernel, const GroupMax& options, int64_t first_row, int64_t n_rows,
                 float* pre, int32_t* idx) {
    const PackedRows x(e, kernel, first_row, n_rows, options.n_threads);
    // Threads share the rows, and the groups where rows are few: each list belongs to one of them.
    const Split split = split_work(x.n_blocks(), options.groups, 1, options.n_threads);
    const int64_t width = e.n_ids / options.groups, row_size = options.groups * options.best;
    auto run = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Piece piece = piece_of(split, i, x.n_blocks(), options.groups);
            Best best(piece.first_block, piece.last_block - piece.first_block, kernel.rows, options.best);
            const int64_t last_row = std::min(n_rows, piece.last_block * kernel.rows);
            for (int64_t group = piece.first; group < piece.last; ++group) {
                best.begin_group();
                visit_tiles(e, kernel, x, piece.first_block, piece.last_block, group * width, (group + 1) * width, best);
                for (int64_t row = piece.first_block * kernel.rows; row < last_row; ++row) {
                    const int64_t at = (first_row + row) * row_size + group * options.best;
                    best.write_group(row, pre + at, idx + at);
                }
            }
        }
    };
    parallel_for(split.row_parts * split.ranges, options.n_threads, run);
}

// Rows whose packed x and lists fit the scratch, at least one block.
int64_t rows_at_once(const Encoder& e, const TileKernel& kernel, const GroupMax& options) {
    const int64_t depth = packed_depth(e.d_in, kernel), threads = resolve_threads(options.n_threads);
    const int64_t room = options.max_scratch_bytes - threads * chunk_bytes(depth, kernel);
    const int64_t list = options.best * static_cast<int64_t>(sizeof(Entry)) + 16;
    auto bytes = [&](int64_t blocks) {
        const Split split = split_work(blocks, options.groups, 1, options.n_threads);
        return blocks * kernel.rows * (4 * depth + split.ranges * list);
    };
    int64_t blocks = std::max<int64_t>(1, (e.n_rows + kernel.rows - 1) / kernel.rows);
    while (blocks > 1 && bytes(blocks) > room) blocks = blocks * 3 / 4;
    return blocks * kernel.rows;
}

}  // namespace

void encode_group_max(const Encoder& e, const GroupMax& options, float* pre, int32_t* idx) {
    check_ids(e);
    if (options.groups < 1 || e.n_ids % options.groups != 0)
        throw std::invalid_argument(std::to_string(e.n_ids) + " latents are not " + std::to_string(options.groups) +
                                    " equal groups");
    if (options.best < 1 || options.best > e.n_ids / options.groups)
        throw std::invalid_argument("best is " + std::to_string(options.best) + ", outside [1, " +
                                    std::to_string(e.n_ids / options.groups) + "]");
    const TileKernel& kernel = pick_tile_kernel(e.type == Float::bf16, e.n_rows, options.kernel);
    const int64_t step = rows_at_once(e, kernel, options);
    for (int64_t row = 0; row < e.n_rows; row += step)
        encode_rows(e, kernel, options, row, std::min(step, e.n_rows - row), pre, idx);
}

}  // namespace saefast
