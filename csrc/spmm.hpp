// Products of a sparse code with a matrix on the CPU, gathered row by row and summed in fp32.
#pragma once

#include <cstdint>

#include "floats.hpp"

namespace saefast {

// A sparse code: idx (n_rows, k) into a weight matrix W (n_latents, d) of any float type, all contiguous.
struct Gathered {
    Float type;
    const void* W;
    int64_t n_latents, d;
    const void* idx;  // int32, or int64 where wide_idx
    bool wide_idx;
    int64_t n_rows, k;
    int n_threads;  // <= 0: one per core
};

// out[b] = Σ_j acts[b, j] · W[idx[b, j]], added in the order of j. acts (n_rows, k), out (n_rows, d).
// Both throw std::out_of_range naming the first idx outside [0, n_latents), nothing written.
void spmm(const Gathered& code, const float* acts, float* out);

// out[b, j] = x[b] · W[idx[b, j]]. x (n_rows, d), out (n_rows, k).
void sddmm(const Gathered& code, const float* x, float* out);

}  // namespace saefast
