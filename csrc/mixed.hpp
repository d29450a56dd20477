// Top-k encoder of two precisions: cheap products choose candidates, fp32 products decide among them.
#pragma once

#include <cstdint>

#include "topk.hpp"

namespace saefast {

// `low` holds x and W rounded, in bf16 or fp16: its options.k best are chosen as encode_topk does. x (n_rows, d_in) and
// W (n_latents, d_in), both fp32, then give each its value, and the k <= options.k best of those are written, in the
// order of encode_topk: acts (n_rows, k), idx (n_rows, k). Throws as encode_topk does.
void encode_topk_mixed(const Encoder& low, const TopK& options, const float* x, const float* W, int64_t k, float* acts,
                       int32_t* idx);

}  // namespace saefast
