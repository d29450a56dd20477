// The pass over W that every CPU encoder shares: pre = x · Wᵀ + b, tile by tile, handing on only what beats a bound.
// The weights are packed chunk by chunk into the second-level cache, x once; nothing of size (rows, latents) exists.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "floats.hpp"
#include "tiles.hpp"

namespace saefast {

struct Encoder {
    Float type;             // of x and W
    const void* x;          // (n_rows, d_in), contiguous
    const void* W;          // (n_latents, d_in), contiguous
    int64_t n_rows, d_in, n_latents;
    const float* bias;      // (n_latents,) or null
    const float* scale;     // (n_latents,) or null: latents are compared by scale * pre
    const float* threshold; // (n_latents,) or null: the bound of a latent; where null, rows have bounds
    const int64_t* ids;     // (n_ids,) latents that compete, or null for all
    int64_t n_ids;          // latents that compete

    int64_t id(int64_t position) const { return ids == nullptr ? position : ids[position]; }
};

// Throws std::out_of_range where an id lies outside [0, n_latents).
void check_ids(const Encoder& encoder);

// Row blocks of x, each [depth][kernel.rows], short blocks filled up with zeros.
class PackedRows {
  public:
    PackedRows(const Encoder& encoder, const TileKernel& kernel, int64_t first_row, int64_t n_rows, int n_threads);
    int64_t n_rows() const { return n_rows_; }
    int64_t n_blocks() const { return n_blocks_; }
    int64_t depth() const { return depth_; }
    const uint32_t* block(int64_t i) const { return units_.get() + i * depth_ * rows_; }

  private:
    int64_t depth_, rows_, n_rows_, n_blocks_;
    std::unique_ptr<uint32_t[]> units_;
};

// Four-byte units one row takes when packed.
int64_t packed_depth(int64_t d_in, const TileKernel& kernel);

// Latents packed in one go, and the bytes of scratch that takes on each thread.
int64_t chunk_latents(int64_t depth, const TileKernel& kernel);
int64_t chunk_bytes(int64_t depth, const TileKernel& kernel);

// What a tile found: pre of `n` latents, positions ascending, for kernel.rows rows. Compared is scale * pre.
struct Found {
    int64_t block;        // which block of rows
    uint32_t rows;        // bit r: some latent of row r beats its bound
    const float* pre;     // [n][stride]
    int64_t stride;
    const float* scale;   // [n]
    const float* bound;   // [n] where latents have bounds, else null
    const int64_t* ids;   // [n]
    int64_t position;     // of the first of them among the latents that compete
    int n;
};

class Sink {
  public:
    virtual ~Sink() = default;
    // The bounds of a block's rows, [kernel.rows]; read anew before every tile. Null where latents have bounds.
    virtual const float* row_bounds(int64_t block) = 0;
    virtual void take(const Found& found) = 0;
};

// Blocks of rows [first_block, last_block) against competing latents at positions [first, last). Each row is
// compared with its latents in ascending order.
void visit_tiles(const Encoder& encoder, const TileKernel& kernel, const PackedRows& x, int64_t first_block,
           int64_t last_block, int64_t first, int64_t last, Sink& sink);

// How a (rows, latents) rectangle is dealt to threads: row_parts × ranges pieces of about equal work.
struct Split {
    int64_t row_parts, ranges;
};
Split split_work(int64_t n_blocks, int64_t n_ids, int64_t least_range, int n_threads);

// Piece number `i` of a split, i < row_parts * ranges: its range of latents, and where it begins and ends.
struct Piece {
    int64_t range;
    int64_t first_block, last_block;
    int64_t first, last;  // positions among the latents that compete
};
Piece piece_of(const Split& split, int64_t i, int64_t n_blocks, int64_t n_ids);

}  // namespace saefast
