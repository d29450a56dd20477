// Top-k encoder on the CPU: the k largest of x · Wᵀ + b per row, filtered while the product runs.
#pragma once

#include <cstdint>

#include "encode.hpp"

namespace saefast {

struct TopK {
    int64_t k;                  // 1 <= k <= encoder.n_ids
    bool relu;                  // clip the values at zero once selected
    int64_t max_scratch_bytes;  // rows are taken in as many goes as this asks for
    const char* kernel;         // a tile kernel's name, or null for the best one here
    int n_threads;              // <= 0: one per core
};

// acts (n_rows, k) and idx (n_rows, k): values descending, ties to the lower latent, NaN above +inf, -0 equal to 0.
// The same bits for any number of threads, scratch and batch. Throws std::out_of_range for a bad id and
// std::invalid_argument for a bad k or kernel, before anything is written.
void encode_topk(const Encoder& encoder, const TopK& options, float* acts, int32_t* idx);

}  // namespace saefast
