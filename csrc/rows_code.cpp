// Bookkeeping of a sparse code: grouping its entries by latent, and weighing them.

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "rows.hpp"

namespace saefast {
namespace {

constexpr int kDigitBits = 11;
constexpr int64_t kBuckets = int64_t{1} << kDigitBits;

struct Entry {
    int32_t latent;
    int32_t position;
};

// One stable pass of a radix sort by the digit at `shift`.
void radix_pass(const std::vector<Entry>& from, std::vector<Entry>& to, int shift) {
    std::array<int64_t, kBuckets> start{};
    const auto digit = [shift](const Entry& e) { return (e.latent >> shift) & (kBuckets - 1); };
    for (const Entry& e : from) ++start[static_cast<size_t>(digit(e))];
    int64_t sum = 0;
    for (int64_t& s : start) {
        const int64_t count = s;
        s = sum;
        sum += count;
    }
    for (const Entry& e : from) to[static_cast<size_t>(start[static_cast<size_t>(digit(e))]++)] = e;
}

std::vector<Entry> kept_entries(const int32_t* idx, const uint8_t* keep, int64_t n, int64_t n_latents) {
    std::vector<Entry> entries;
    entries.reserve(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
        if (idx[i] < 0 || idx[i] >= n_latents)
            throw std::out_of_range("idx[" + std::to_string(i) + "] is " + std::to_string(idx[i]) + ", outside [0, " +
                                    std::to_string(n_latents) + ")");
        if (keep == nullptr || keep[i] != 0) entries.push_back({idx[i], static_cast<int32_t>(i)});
    }
    return entries;
}

}  // namespace

int64_t group_entries(const int32_t* idx, const uint8_t* keep, int64_t n, int64_t n_latents, int32_t* order,
                   int32_t* latents, int32_t* offsets) {
    std::vector<Entry> entries = kept_entries(idx, keep, n, n_latents), other(entries.size());
    for (int shift = 0; shift < 31 && (n_latents - 1) >> shift > 0; shift += kDigitBits) {
        radix_pass(entries, other, shift);
        entries.swap(other);
    }
    int64_t runs = 0;
    for (size_t i = 0; i < entries.size(); ++i) {
        order[i] = entries[i].position;
        if (i > 0 && entries[i].latent == entries[i - 1].latent) continue;
        latents[runs] = entries[i].latent;
        offsets[runs++] = static_cast<int32_t>(i);
    }
    offsets[runs] = static_cast<int32_t>(entries.size());
    return runs;
}

void fill_entries(const EntryParts& parts, const int32_t* order, const int32_t* latents, const int32_t* offsets,
                  int64_t n_runs, int64_t n_latents, int32_t* dec_row, float* dec_coef, int32_t* enc_row,
                  float* enc_coef, float* grad_by_latent) {
    std::fill(grad_by_latent, grad_by_latent + n_latents, 0.0f);
    for (int64_t run = 0; run < n_runs; ++run) {
        float sum = 0;
        for (int64_t i = offsets[run]; i < offsets[run + 1]; ++i) {
            const int64_t entry = order[i];
            int64_t part = 0, at = entry;
            while (at >= parts.n_tokens * parts.columns[part]) at -= parts.n_tokens * parts.columns[part++];
            const int64_t token = at / parts.columns[part], j = at % parts.columns[part];
            const int64_t plane =
                part > 0 ? parts.n_bounds - 1 + part
                         : std::upper_bound(parts.bounds, parts.bounds + parts.n_bounds, j) - parts.bounds;
            dec_row[i] = static_cast<int32_t>(plane * parts.n_tokens + token);
            dec_coef[i] = -2.0f * parts.acts[entry];
            enc_row[i] = static_cast<int32_t>(token);
            enc_coef[i] = parts.grad[entry];
            sum += parts.grad[entry];
        }
        grad_by_latent[latents[run]] = sum;
    }
}

}  // namespace saefast
