// The encoders and the gathered products under the sanitizers, on every tile kernel this machine runs: integer values,
// so that results are exact, and operands in allocations of their own, so that one byte too many is seen.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "spmm.hpp"
#include "threshold.hpp"
#include "topk.hpp"

namespace {

using saefast::Encoder;
using saefast::Float;

std::mt19937 rng(11);

// Whole numbers in -3 .. 3, as a type's bytes.
std::vector<unsigned char> integers(Float type, int64_t n, std::vector<float>& values) {
    values.resize(static_cast<size_t>(n));
    std::vector<unsigned char> bytes(static_cast<size_t>(n * saefast::bytes_of(type)));
    const uint16_t fp16[] = {0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200};
    for (size_t i = 0; i < values.size(); ++i) {
        const int value = static_cast<int>(rng() % 7) - 3;
        values[i] = static_cast<float>(value);
        const uint32_t bits = saefast::to_bits(values[i]);
        const auto bf16 = static_cast<uint16_t>(bits >> 16);
        if (type == Float::fp32) std::memcpy(bytes.data() + 4 * i, &bits, 4);
        if (type == Float::bf16) std::memcpy(bytes.data() + 2 * i, &bf16, 2);
        if (type == Float::fp16) std::memcpy(bytes.data() + 2 * i, &fp16[value + 3], 2);
    }
    return bytes;
}

struct Problem {
    Problem(Float type, int64_t rows, int64_t d, int64_t latents)
        : x_bytes(integers(type, rows * d, x)), W_bytes(integers(type, latents * d, W)), bias(latents, 0.0f) {
        for (auto& b : bias) b = static_cast<float>(rng() % 5);
        for (int64_t i = 0; i < latents; i += 3) ids.push_back(i);
        encoder = {type,        x_bytes.data(), W_bytes.data(), rows,    d,      latents,
                   bias.data(), nullptr,        nullptr,        nullptr, latents};
    }

    float pre(int64_t row, int64_t latent) const {
        const int64_t d = encoder.d_in;
        return std::inner_product(x.begin() + row * d, x.begin() + (row + 1) * d, W.begin() + latent * d,
                                  bias[static_cast<size_t>(latent)]);
    }

    std::vector<float> x, W;
    std::vector<unsigned char> x_bytes, W_bytes;
    std::vector<float> bias;
    std::vector<int64_t> ids;
    Encoder encoder;
};

void topk(const Problem& p, const Encoder& e, int64_t k, const char* kernel, int64_t scratch) {
    std::vector<float> acts(static_cast<size_t>(e.n_rows * k));
    std::vector<int32_t> idx(acts.size());
    saefast::encode_topk(e, {k, false, scratch, kernel, 3}, acts.data(), idx.data());
    for (int64_t row = 0; row < e.n_rows; ++row) {
        std::vector<int64_t> best(static_cast<size_t>(e.n_ids));
        for (int64_t i = 0; i < e.n_ids; ++i) best[static_cast<size_t>(i)] = e.id(i);
        std::stable_sort(best.begin(), best.end(), [&](int64_t a, int64_t b) { return p.pre(row, a) > p.pre(row, b); });
        for (int64_t j = 0; j < k; ++j) {
            CHECK(idx[static_cast<size_t>(row * k + j)] == best[static_cast<size_t>(j)]);
            CHECK(acts[static_cast<size_t>(row * k + j)] == p.pre(row, best[static_cast<size_t>(j)]));
        }
    }
}

void threshold(const Problem& p, const char* kernel) {
    const std::vector<float> bound(static_cast<size_t>(p.encoder.n_latents), 4.0f);
    Encoder e = p.encoder;
    e.threshold = bound.data();
    const saefast::ThresholdCode code(e, 1 << 16, kernel, 3);
    std::vector<int64_t> row_ptr(static_cast<size_t>(e.n_rows + 1));
    std::vector<int32_t> idx(static_cast<size_t>(code.size()));
    std::vector<float> acts(idx.size());
    code.write(row_ptr.data(), idx.data(), acts.data());
    size_t at = 0;
    for (int64_t row = 0; row < e.n_rows; ++row)
        for (int64_t latent = 0; latent < e.n_latents; ++latent)
            if (p.pre(row, latent) > 4.0f) CHECK(idx[at] == latent && acts[at++] == p.pre(row, latent));
    CHECK(at == idx.size() && row_ptr.back() == code.size());
}

void encoders(Float type, int64_t rows, int64_t d, int64_t latents, int64_t k) {
    const Problem p(type, rows, d, latents);
    for (const std::string& kernel : saefast::tile_kernel_names(type == Float::bf16)) {
        topk(p, p.encoder, k, kernel.c_str(), 1 << 30);
        topk(p, p.encoder, k, kernel.c_str(), 1);
        threshold(p, kernel.c_str());
        Encoder some = p.encoder;
        some.ids = p.ids.data();
        some.n_ids = static_cast<int64_t>(p.ids.size());
        topk(p, some, std::min(k, some.n_ids), kernel.c_str(), 1 << 30);
    }
}

void gathered(Float type, int64_t rows, int64_t latents, int64_t d, int64_t k) {
    std::vector<float> W, acts, x;
    const auto W_bytes = integers(type, latents * d, W);
    integers(Float::fp32, rows * k, acts);
    integers(Float::fp32, rows * d, x);
    std::vector<int64_t> idx(static_cast<size_t>(rows * k));
    for (auto& i : idx) i = static_cast<int64_t>(rng() % static_cast<uint32_t>(latents));
    saefast::Gathered code{type, W_bytes.data(), latents, d, idx.data(), true, rows, k, 3};
    std::vector<float> out(static_cast<size_t>(rows * d)), dots(idx.size());
    saefast::spmm(code, acts.data(), out.data());
    saefast::sddmm(code, x.data(), dots.data());
    for (int64_t b = 0; b < rows; ++b) {
        std::vector<float> sum(static_cast<size_t>(d));
        for (int64_t j = b * k; j < (b + 1) * k; ++j) {
            float dot = 0;
            for (int64_t i = 0; i < d; ++i) {
                const float w = W[static_cast<size_t>(idx[static_cast<size_t>(j)] * d + i)];
                sum[static_cast<size_t>(i)] += acts[static_cast<size_t>(j)] * w;
                dot += x[static_cast<size_t>(b * d + i)] * w;
            }
            CHECK(dots[static_cast<size_t>(j)] == dot);
        }
        CHECK(std::equal(sum.begin(), sum.end(), out.begin() + b * d));
    }
    if (idx.empty()) return;
    idx.back() = latents;
    const auto before = dots;
    bool thrown = false;
    try {
        saefast::sddmm(code, x.data(), dots.data());
    } catch (const std::out_of_range&) {
        thrown = true;
    }
    CHECK(thrown && dots == before);
}

}  // namespace

int main() {
    for (Float type : {Float::fp32, Float::bf16, Float::fp16}) {
        encoders(type, 1, 1, 1, 1);
        encoders(type, 3, 7, 50, 50);
        encoders(type, 33, 13, 700, 9);
        encoders(type, 70, 300, 131, 40);
        gathered(type, 1, 1, 1, 1);
        gathered(type, 9, 40, 131, 7);
        gathered(type, 40, 90, 64, 12);
        gathered(type, 3, 5, 0, 2);
    }
    return 0;
}
