#include "threshold.hpp"

#include <algorithm>
#include <stdexcept>

#include "threads.hpp"

namespace saefast {

// A range shorter than this is not worth a thread.
constexpr int64_t kLeastRange = 1024;

class ThresholdSink final : public Sink {
  public:
    ThresholdSink(std::vector<std::vector<ThresholdCode::List>>& rows, int64_t first_row, int64_t block_rows,
                  int64_t range)
        : rows_(rows), first_row_(first_row), block_rows_(block_rows), range_(static_cast<size_t>(range)) {}

    const float* row_bounds(int64_t /*block*/) override { return nullptr; }

    void take(const Found& found) override {
        for (uint32_t rest = found.rows; rest != 0; rest &= rest - 1) {
            const int r = __builtin_ctz(rest);
            auto& list = rows_[static_cast<size_t>(first_row_ + found.block * block_rows_ + r)][range_];
            for (int i = 0; i < found.n; ++i) {
                const float pre = found.pre[i * found.stride + r];
                if (!(pre <= found.bound[i])) list.push_back({static_cast<int32_t>(found.ids[i]), pre});
            }
        }
    }

  private:
    std::vector<std::vector<ThresholdCode::List>>& rows_;
    int64_t first_row_, block_rows_;
    size_t range_;
};

void ThresholdCode::encode_rows(const Encoder& e, const TileKernel& kernel, int64_t first_row, int64_t n_rows,
                                int n_threads) {
    const PackedRows x(e, kernel, first_row, n_rows, n_threads);
    const Split split = split_work(x.n_blocks(), e.n_ids, kLeastRange, n_threads);
    for (int64_t row = first_row; row < first_row + n_rows; ++row)
        rows_[static_cast<size_t>(row)].resize(static_cast<size_t>(split.ranges));
    auto run = [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const Piece piece = piece_of(split, task, x.n_blocks(), e.n_ids);
            ThresholdSink sink(rows_, first_row, kernel.rows, piece.range);
            visit_tiles(e, kernel, x, piece.first_block, piece.last_block, piece.first, piece.last, sink);
        }
    };
    parallel_for(split.row_parts * split.ranges, n_threads, run);
}

ThresholdCode::ThresholdCode(const Encoder& e, int64_t max_scratch_bytes, const char* kernel_name, int n_threads)
    : rows_(static_cast<size_t>(e.n_rows)) {
    check_ids(e);
    const TileKernel& kernel = pick_tile_kernel(e.type == Float::bf16, e.n_rows, kernel_name);
    const int64_t depth = packed_depth(e.d_in, kernel);
    const int64_t room = max_scratch_bytes - resolve_threads(n_threads) * chunk_bytes(depth, kernel);
    const int64_t blocks = std::max<int64_t>(1, room / (kernel.rows * std::max<int64_t>(4, 4 * depth)));
    const int64_t step = blocks * kernel.rows;
    for (int64_t row = 0; row < e.n_rows; row += step)
        encode_rows(e, kernel, row, std::min(step, e.n_rows - row), n_threads);
}

int64_t ThresholdCode::size() const {
    int64_t total = 0;
    for (const auto& ranges : rows_)
        for (const List& list : ranges) total += static_cast<int64_t>(list.size());
    return total;
}

void ThresholdCode::write(int64_t* row_ptr, int32_t* idx, float* acts) const {
    int64_t at = 0;
    *row_ptr = 0;
    for (const auto& ranges : rows_) {
        for (const List& list : ranges)
            for (const Entry& entry : list) {
                idx[at] = entry.id;
                acts[at++] = entry.pre;
            }
        *++row_ptr = at;
    }
}

}  // namespace saefast
