#include "encode.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace saefast {
namespace {

// Half of the smallest second-level cache in use (512 KiB): the packed weights share it with a block of x.
constexpr int64_t kChunkBytes = 256 * 1024;
// With fewer blocks of rows per thread, packing the weights on every thread would cost more than a few percent.
constexpr int64_t kBlocksPerThread = 8;

template <class Type>
void widen(const void* row, int64_t n, uint32_t* units) {
    const auto* stored = static_cast<const typename Type::Stored*>(row);
    for (int64_t i = 0; i < n; ++i) units[i] = to_bits(Type::read(stored[i]));
}

SAEFAST_CLONES void widen_bf16(const void* row, int64_t n, uint32_t* units) { widen<Bf16>(row, n, units); }
SAEFAST_CLONES void widen_fp16(const void* row, int64_t n, uint32_t* units) { widen<Fp16>(row, n, units); }

// The units of one row: in place where it holds them already, else written to `spare`.
const uint32_t* unit_row(const Encoder& e, const TileKernel& kernel, const void* base, int64_t row, uint32_t* spare) {
    const char* at = static_cast<const char*>(base) + row * e.d_in * bytes_of(e.type);
    const bool aligned = reinterpret_cast<std::uintptr_t>(at) % alignof(uint32_t) == 0;
    const bool units_already = e.type == Float::fp32 || (kernel.pairs && e.d_in % 2 == 0);
    if (units_already && aligned) return reinterpret_cast<const uint32_t*>(at);
    if (kernel.pairs || e.type == Float::fp32) {
        if (e.d_in > 0) spare[packed_depth(e.d_in, kernel) - 1] = 0;
        std::memcpy(spare, at, static_cast<size_t>(e.d_in * bytes_of(e.type)));
    } else if (e.type == Float::bf16) {
        widen_bf16(at, e.d_in, spare);
    } else {
        widen_fp16(at, e.d_in, spare);
    }
    return spare;
}

using Four = uint32_t __attribute__((vector_size(16)));

#if defined(__clang__)
#define SAEFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SAEFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif

// Four units of four rows, transposed; the four rows of the result lie `stride` units apart.
inline void transpose4(const uint32_t* const* rows, int64_t d, uint32_t* dst, int64_t stride) {
    Four in[4];
    for (int r = 0; r < 4; ++r) std::memcpy(&in[r], rows[r] + d, sizeof in[r]);
    const Four low01 = SAEFAST_SHUFFLE(in[0], in[1], 0, 4, 1, 5), high01 = SAEFAST_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
    const Four low23 = SAEFAST_SHUFFLE(in[2], in[3], 0, 4, 1, 5), high23 = SAEFAST_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
    const Four out[4] = {SAEFAST_SHUFFLE(low01, low23, 0, 1, 4, 5), SAEFAST_SHUFFLE(low01, low23, 2, 3, 6, 7),
                         SAEFAST_SHUFFLE(high01, high23, 0, 1, 4, 5), SAEFAST_SHUFFLE(high01, high23, 2, 3, 6, 7)};
    for (int c = 0; c < 4; ++c) std::memcpy(dst + c * stride, &out[c], sizeof out[c]);
}

// dst[d * n + i] = rows[i][d] for n rows, n a multiple of four.
void interleave(const uint32_t* const* rows, int n, int64_t depth, uint32_t* dst) {
    const int64_t whole = depth / 4 * 4;
    for (int64_t d = 0; d < whole; d += 4)
        for (int i = 0; i < n; i += 4) transpose4(rows + i, d, dst + d * n + i, n);
    for (int64_t d = whole; d < depth; ++d)
        for (int i = 0; i < n; ++i) std::memcpy(dst + d * n + i, rows[i] + d, sizeof *dst);
}

// Packs up to `width` rows of a matrix, asked for by `row_of(i)`; zeros stand in for the rest.
template <class RowOf>
void pack_group(const Encoder& e, const TileKernel& kernel, const void* base, int64_t n, int width, const RowOf& row_of,
                uint32_t* dst, std::vector<uint32_t>& spare) {
    const int64_t depth = packed_depth(e.d_in, kernel);
    // One row of zeros, then room for each row that has to be converted.
    spare.resize(static_cast<size_t>(depth * (width + 1)));
    const uint32_t* rows[kMaxTileRows];
    for (int i = 0; i < width; ++i)
        rows[i] = i < n ? unit_row(e, kernel, base, row_of(i), spare.data() + (i + 1) * depth) : spare.data();
    interleave(rows, width, depth, dst);
}

// One chunk of latents, packed, with its constants.
struct Chunk {
    Chunk(const TileKernel& kernel, int64_t depth)
        : units(new uint32_t[static_cast<size_t>(chunk_latents(depth, kernel) * depth)]) {}

    void fill(const Encoder& e, const TileKernel& kernel, int64_t depth, int64_t first, int64_t n) {
        const auto padded = static_cast<size_t>((n + kernel.latents - 1) / kernel.latents * kernel.latents);
        this->first = first;
        bias.assign(padded, 0.0f);
        scale.assign(padded, 1.0f);
        bound.assign(padded, 0.0f);
        ids.assign(padded, 0);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t id = e.id(first + i);
            ids[static_cast<size_t>(i)] = id;
            if (e.bias != nullptr) bias[static_cast<size_t>(i)] = e.bias[id];
            if (e.scale != nullptr) scale[static_cast<size_t>(i)] = e.scale[id];
            if (e.threshold != nullptr) bound[static_cast<size_t>(i)] = e.threshold[id];
        }
        for (int64_t g = 0; g < n; g += kernel.latents)
            pack_group(e, kernel, e.W, std::min<int64_t>(kernel.latents, n - g), kernel.latents,
                       [&](int64_t i) { return ids[static_cast<size_t>(g + i)]; }, units.get() + g * depth, spare);
    }

    std::unique_ptr<uint32_t[]> units;
    int64_t first = 0;
    std::vector<float> bias, scale, bound;
    std::vector<int64_t> ids;
    std::vector<uint32_t> spare;
};

// Asks for the weights of the next chunk, some lines with every tile: packing would otherwise wait for memory.
class Ahead {
  public:
    Ahead(const Encoder& e, int64_t first, int64_t n, int64_t n_tiles)
        : e_(e),
          first_(first),
          row_bytes_(e.d_in * bytes_of(e.type)),
          lines_per_row_((row_bytes_ + kLine - 1) / kLine),
          lines_(n * lines_per_row_),
          per_tile_((lines_ + n_tiles - 1) / std::max<int64_t>(1, n_tiles)) {}

    void tile_done() {
        for (const int64_t stop = std::min(lines_, line_ + per_tile_); line_ < stop; ++line_) {
            const int64_t row = e_.id(first_ + line_ / lines_per_row_);
            const char* at = static_cast<const char*>(e_.W) + row * row_bytes_;
            __builtin_prefetch(at + line_ % lines_per_row_ * kLine, 0, 2);
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    const Encoder& e_;
    int64_t first_, row_bytes_, lines_per_row_, lines_, per_tile_, line_ = 0;
};

// All latents of a chunk against one block of rows, of which `n_rows` are real.
void visit_block(const Encoder& e, const TileKernel& kernel, const PackedRows& x, int64_t block, const Chunk& chunk,
                 int64_t n, Ahead& ahead, Sink& sink) {
    const int64_t n_rows = std::min<int64_t>(kernel.rows, x.n_rows() - block * kernel.rows);
    const uint32_t real_rows = n_rows == 32 ? ~0u : (1u << n_rows) - 1;
    alignas(64) float pre[kMaxTileRows * kMaxTileLatents];
    for (int64_t g = 0; g < n; g += kernel.latents) {
        const float* latent_bound = e.threshold == nullptr ? nullptr : chunk.bound.data() + g;
        const Tile tile{x.block(block),      chunk.units.get() + g * x.depth(), x.depth(),    chunk.bias.data() + g,
                        chunk.scale.data() + g, sink.row_bounds(block),           latent_bound, pre};
        const uint32_t rows = kernel.run(tile) & real_rows;
        ahead.tile_done();
        if (rows == 0) continue;
        const int width = static_cast<int>(std::min<int64_t>(kernel.latents, n - g));
        const int64_t* ids = chunk.ids.data() + g;
        sink.take({block, rows, pre, kernel.rows, tile.scale, latent_bound, ids, chunk.first + g, width});
    }
}

}  // namespace

void check_ids(const Encoder& e) {
    if (e.ids == nullptr) return;
    for (int64_t i = 0; i < e.n_ids; ++i)
        if (static_cast<uint64_t>(e.ids[i]) >= static_cast<uint64_t>(e.n_latents))
            throw std::out_of_range("latents[" + std::to_string(i) + "] is " + std::to_string(e.ids[i]) +
                                    ", outside [0, " + std::to_string(e.n_latents) + ")");
}

int64_t packed_depth(int64_t d_in, const TileKernel& kernel) { return kernel.pairs ? (d_in + 1) / 2 : d_in; }

int64_t chunk_latents(int64_t depth, const TileKernel& kernel) {
    const int64_t fit = kChunkBytes / std::max<int64_t>(1, depth * 4);
    return std::clamp<int64_t>(fit / kernel.latents, 1, 256) * kernel.latents;
}

int64_t chunk_bytes(int64_t depth, const TileKernel& kernel) {
    return (chunk_latents(depth, kernel) + 2 * kMaxTileRows) * depth * 4;
}

PackedRows::PackedRows(const Encoder& e, const TileKernel& kernel, int64_t first_row, int64_t n_rows, int n_threads)
    : depth_(packed_depth(e.d_in, kernel)),
      rows_(kernel.rows),
      n_rows_(n_rows),
      n_blocks_((n_rows + kernel.rows - 1) / kernel.rows),
      units_(new uint32_t[static_cast<size_t>(n_blocks_ * depth_ * rows_)]) {
    auto pack = [&](int64_t begin, int64_t end) {
        std::vector<uint32_t> spare;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * rows_;
            pack_group(e, kernel, e.x, std::min(rows_, n_rows - first), kernel.rows,
                       [&](int64_t i) { return first_row + first + i; }, units_.get() + block * depth_ * rows_, spare);
        }
    };
    parallel_for(n_blocks_, n_threads, pack, 4);
}

void visit_tiles(const Encoder& e, const TileKernel& kernel, const PackedRows& x, int64_t first_block, int64_t last_block,
           int64_t first, int64_t last, Sink& sink) {
    const int64_t step = chunk_latents(x.depth(), kernel);
    Chunk chunk(kernel, x.depth());
    for (int64_t at = first; at < last; at += step) {
        const int64_t n = std::min(step, last - at);
        chunk.fill(e, kernel, x.depth(), at, n);
        const int64_t groups = (n + kernel.latents - 1) / kernel.latents;
        Ahead ahead(e, at + n, std::min(step, last - at - n), groups * (last_block - first_block));
        for (int64_t block = first_block; block < last_block; ++block)
            visit_block(e, kernel, x, block, chunk, n, ahead, sink);
    }
}

Split split_work(int64_t n_blocks, int64_t n_ids, int64_t least_range, int n_threads) {
    const int64_t threads = resolve_threads(n_threads);
    const int64_t row_parts = std::clamp<int64_t>(n_blocks / kBlocksPerThread, 1, threads);
    const int64_t ranges = std::clamp<int64_t>(n_ids / std::max<int64_t>(1, least_range), 1, threads / row_parts);
    return {row_parts, ranges};
}

Piece piece_of(const Split& split, int64_t i, int64_t n_blocks, int64_t n_ids) {
    const int64_t part = i / split.ranges, range = i % split.ranges;
    auto edge = [](int64_t at, int64_t parts, int64_t n) { return n / parts * at + std::min(at, n % parts); };
    return {range, edge(part, split.row_parts, n_blocks), edge(part + 1, split.row_parts, n_blocks),
            edge(range, split.ranges, n_ids), edge(range + 1, split.ranges, n_ids)};
}

}  // namespace saefast
