// The group-max encoder under the sanitizers, on every tile kernel this machine runs: whole numbers, so that sums are
// exact, groups that no tile fits, and as little scratch as can be.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "group_max.hpp"

namespace {

using saefast::Encoder;
using saefast::Float;

std::vector<float> whole_numbers(int64_t n, std::mt19937& rng) {
    std::vector<float> values(static_cast<size_t>(n));
    for (auto& value : values) value = static_cast<float>(static_cast<int>(rng() % 7) - 3);
    return values;
}

void encode(int64_t rows, int64_t d, int64_t groups, int64_t width, int64_t best) {
    std::mt19937 rng(5);
    const int64_t latents = groups * width;
    const auto x = whole_numbers(rows * d, rng), W = whole_numbers(latents * d, rng), bias = whole_numbers(latents, rng);
    const Encoder e{Float::fp32, x.data(), W.data(), rows, d, latents, bias.data(), nullptr, nullptr, nullptr, latents};
    auto pre = [&](int64_t row, int64_t latent) {
        return std::inner_product(x.begin() + row * d, x.begin() + (row + 1) * d, W.begin() + latent * d,
                                  bias[static_cast<size_t>(latent)]);
    };
    for (const std::string& kernel : saefast::tile_kernel_names(false))
        for (const int64_t scratch : {int64_t{1}, int64_t{1} << 30}) {
            std::vector<float> found(static_cast<size_t>(rows * groups * best));
            std::vector<int32_t> idx(found.size());
            saefast::encode_group_max(e, {groups, best, scratch, kernel.c_str(), 3}, found.data(), idx.data());
            size_t at = 0;
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t group = 0; group < groups; ++group) {
                    std::vector<int64_t> order(static_cast<size_t>(width));
                    std::iota(order.begin(), order.end(), group * width);
                    std::stable_sort(order.begin(), order.end(),
                                     [&](int64_t a, int64_t b) { return pre(row, a) > pre(row, b); });
                    for (int64_t j = 0; j < best; ++j, ++at)
                        CHECK(idx[at] == order[static_cast<size_t>(j)] && found[at] == pre(row, idx[at]));
                }
        }
}

void refused() {
    const std::vector<float> x(4), W(24);
    const Encoder e{Float::fp32, x.data(), W.data(), 1, 4, 6, nullptr, nullptr, nullptr, nullptr, 6};
    for (const auto& [groups, best] : {std::pair{4, 1}, {0, 1}, {3, 3}, {3, 0}}) {
        bool thrown = false;
        try {
            saefast::encode_group_max(e, {groups, best, 1 << 20, nullptr, 1}, nullptr, nullptr);
        } catch (const std::invalid_argument&) {
            thrown = true;
        }
        CHECK(thrown);
    }
}

}  // namespace

int main() {
    encode(1, 3, 4, 5, 1);
    encode(70, 7, 3, 29, 2);
    encode(600, 5, 7, 13, 1);
    encode(0, 5, 7, 13, 1);
    encode(33, 1, 1, 40, 40);
    refused();
}
