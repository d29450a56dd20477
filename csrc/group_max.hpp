// Group-max encoder on the CPU: the largest values of each group of latents, filtered while the product runs.
#pragma once

#include <cstdint>

#include "encode.hpp"

namespace saefast {

struct GroupMax {
    int64_t groups;             // equal runs of competing latents: a divisor of encoder.n_ids
    int64_t best;               // entries kept of each group, 1 <= best <= latents in it
    int64_t max_scratch_bytes;  // rows are taken in as many goes as this asks for
    const char* kernel;         // a tile kernel's name, or null for the best one here
    int n_threads;              // <= 0: one per core
};

// pre and idx (n_rows, groups, best): of each group the largest by scale * pre, descending, ties to the lower latent,
// NaN above +inf, -0 equal to 0. The same bits for any number of threads, scratch and batch. Throws std::out_of_range
// for a bad id and std::invalid_argument for bad groups, best or kernel, before anything is written.
void encode_group_max(const Encoder& encoder, const GroupMax& options, float* pre, int32_t* idx);

}  // namespace saefast
