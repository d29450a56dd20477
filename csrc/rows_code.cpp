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
    int64_t groups = 0;
    for (size_t i = 0; i < entries.size(); ++i) {
        order[i] = entries[i].position;
        if (i > 0 && entries[i].latent == entries[i - 1].latent) continue;
        latents[groups] = entries[i].latent;
        offsets[groups++] = static_cast<int32_t>(i);
    }
    offsets[groups] = static_cast<int32_t>(entries.size());
    return groups;
}

int64_t CodeEntries::row_of(int64_t entry) const {
    if (row_ptr == nullptr) return entry / K;
    return std::min<int64_t>(std::upper_bound(row_ptr + 1, row_ptr + B + 1, entry) - (row_ptr + 1), B - 1);
}

void fill_entries(const std::vector<EntryPart>& parts, const Prefixes& prefixes, const Groups& groups,
                  const Entries& out) {
    std::fill(out.grad_by_latent, out.grad_by_latent + out.n_latents, 0.0f);
    for (int64_t g = 0; g < groups.n; ++g) {
        const int32_t latent = groups.latents[g];
        float sum = 0;
        for (int64_t i = groups.offsets[g]; i < groups.offsets[g + 1]; ++i) {
            size_t part = 0;
            int64_t entry = groups.order[i];
            while (entry >= parts[part].code.n) entry -= parts[part++].code.n;
            const CodeEntries& code = parts[part].code;
            const int64_t row = code.row_of(entry);
            const int64_t prefix = part > 0 ? 0 : prefixes.of(entry - code.begin(row), latent);
            const int64_t plane =
                part > 0 ? prefixes.P - 1 + static_cast<int64_t>(part) : std::min(prefix, prefixes.P - 1);
            out.dec_row[i] = static_cast<int32_t>(plane * code.B + row);
            out.dec_coef[i] = prefix < prefixes.P ? -2.0f * code.acts[entry] : 0.0f;
            out.enc_row[i] = static_cast<int32_t>(row);
            out.enc_coef[i] = parts[part].grad[entry];
            sum += parts[part].grad[entry];
        }
        out.grad_by_latent[latent] = sum;
    }
}

}  // namespace saefast
