#include "mixed.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "keys.hpp"
#include "spmm.hpp"
#include "threads.hpp"

namespace saefast {
namespace {

struct Candidate {
    uint64_t key;
    float pre;
};

// The k best of n latents with values `pre`, to which the bias is still to be added.
void decide(const Encoder& e, const int32_t* latents, const float* pre, int64_t n, int64_t k, bool relu, float* acts,
            int32_t* idx, std::vector<Candidate>& found) {
    found.clear();
    for (int64_t j = 0; j < n; ++j) {
        const int64_t id = latents[j];
        const float value = e.bias == nullptr ? pre[j] : pre[j] + e.bias[id];
        found.push_back({key_of(e.scale == nullptr ? value : value * e.scale[id], id), value});
    }
    std::partial_sort(found.begin(), found.begin() + k, found.end(),
                      [](const Candidate& a, const Candidate& b) { return a.key > b.key; });
    for (int64_t j = 0; j < k; ++j) {
        const Candidate& best = found[static_cast<size_t>(j)];
        acts[j] = relu && best.pre < 0.0f ? 0.0f : best.pre;
        idx[j] = id_of(best.key);
    }
}

}  // namespace

void encode_topk_mixed(const Encoder& low, const TopK& options, const float* x, const float* W, int64_t k, float* acts,
                       int32_t* idx) {
    const int64_t n = options.k;
    if (k < 1 || k > n)
        throw std::invalid_argument("k is " + std::to_string(k) + ", outside [1, " + std::to_string(n) + "]");
    std::vector<int32_t> latents(static_cast<size_t>(low.n_rows * n));
    std::vector<float> pre(latents.size());
    encode_topk(low, options, pre.data(), latents.data());
    sddmm({Float::fp32, W, low.n_latents, low.d_in, latents.data(), false, low.n_rows, n, options.n_threads}, x,
          pre.data());
    auto rows = [&](int64_t begin, int64_t end) {
        std::vector<Candidate> found;
        for (int64_t row = begin; row < end; ++row)
            decide(low, latents.data() + row * n, pre.data() + row * n, n, k, options.relu, acts + row * k,
                   idx + row * k, found);
    };
    parallel_for(low.n_rows, options.n_threads, rows, 64);
}

}  // namespace saefast
