// Register tiles of pre = x · Wᵀ + b, each compared with bounds while it is still in registers: the inner loop of every
// encoder on the CPU. One kernel per instruction set, picked once at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace saefast {

// The lanes of a vector are rows of x; each latent's weight is broadcast. Both operands come packed, `depth` units of
// four bytes deep: a unit is one fp32, or two neighbouring bf16 where `pairs` says so.
struct Tile {
    const uint32_t* x;          // [depth][rows]
    const uint32_t* w;          // [depth][latents]
    int64_t depth;
    const float* bias;          // [latents]
    const float* scale;         // [latents]: compared is scale * pre
    const float* row_bound;     // [rows], used where latent_bound is null
    const float* latent_bound;  // [latents] or null
    float* pre;                 // [latents][rows], written only where something beats its bound
};

// Largest tile of any kernel, for buffers on the stack.
constexpr int kMaxTileRows = 32;
constexpr int kMaxTileLatents = 12;

struct TileKernel {
    int rows, latents;
    bool pairs;  // multiplies pairs of bf16, adding in fp32
    // Bit r of the result: some latent of row r is not <= its bound (so NaN counts, and a NaN bound lets all through).
    uint32_t (*run)(const Tile& tile);
};

// The kernel for this machine. bf16: both operands are bf16, so pairs may be used. n_rows: few rows get narrower tiles.
// name: an instruction set to force (tests, benchmarks), or null; std::invalid_argument where it cannot run here.
const TileKernel& pick_tile_kernel(bool bf16, int64_t n_rows, const char* name);

// The names that can be asked for here, the default first.
std::vector<std::string> tile_kernel_names(bool bf16);

}  // namespace saefast
