// Latents that fire on the same rows under the sanitizers: against counts of all pairs, on one thread and on three.

#include <algorithm>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "cofiring.hpp"

namespace {

constexpr int64_t kLatents = 70, kRows = 4000, kBest = 5;

struct Code {
    std::vector<int64_t> row_ptr{0}, fired = std::vector<int64_t>(kLatents), ptr{0}, row;
    std::vector<int32_t> idx;

    Code() {
        std::mt19937 rng(3);
        std::vector<std::vector<int64_t>> rows_of(kLatents);
        for (int64_t r = 0; r < kRows; ++r) {
            for (int32_t latent = 0; latent < kLatents - 1; ++latent)
                if (rng() % static_cast<unsigned>(latent + 2) == 0) {
                    idx.push_back(latent);
                    ++fired[static_cast<size_t>(latent)];
                    rows_of[static_cast<size_t>(latent)].push_back(r);
                }
            row_ptr.push_back(static_cast<int64_t>(idx.size()));
        }
        for (const auto& rows : rows_of) {
            row.insert(row.end(), rows.begin(), rows.end());
            ptr.push_back(static_cast<int64_t>(row.size()));
        }
    }

    std::vector<int64_t> met(int32_t latent) const {
        std::vector<int64_t> counts(kLatents);
        for (int64_t i = ptr[static_cast<size_t>(latent)]; i < ptr[static_cast<size_t>(latent) + 1]; ++i) {
            const auto r = static_cast<size_t>(row[static_cast<size_t>(i)]);
            for (int64_t e = row_ptr[r]; e < row_ptr[r + 1]; ++e)
                ++counts[static_cast<size_t>(idx[static_cast<size_t>(e)])];
        }
        counts[static_cast<size_t>(latent)] = 0;
        return counts;
    }
};

void check_lists(const Code& code, int n_threads) {
    std::vector<double> worth(static_cast<size_t>(*std::max_element(code.fired.begin(), code.fired.end())) + 1);
    // A step, so that there are ties.
    for (size_t c = 0; c < worth.size(); ++c) worth[c] = static_cast<double>(c / 8);
    const std::vector<double> least(kLatents, 0.01);
    std::vector<int32_t> ids(kLatents * kBest, -7);
    std::vector<int64_t> counts(kLatents * kBest, -7);
    saefast::cofiring({code.row_ptr.data(), code.idx.data(), kRows, kLatents},
                      {code.ptr.data(), code.row.data(), 0, kLatents},
                      {code.fired.data(), worth.data(), least.data(), static_cast<int64_t>(worth.size()) - 1}, kBest,
                      ids.data(), counts.data(), n_threads);
    for (int32_t latent = 0; latent < kLatents; ++latent) {
        const auto met = code.met(latent);
        const auto rank = [&](int32_t j) {
            return worth[static_cast<size_t>(met[static_cast<size_t>(j)])] /
                   static_cast<double>(std::max<int64_t>(code.fired[static_cast<size_t>(j)], 1));
        };
        std::vector<int32_t> expected;
        for (int32_t j = 0; j < kLatents; ++j)
            if (rank(j) > least[0]) expected.push_back(j);
        std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return rank(a) > rank(b); });
        expected.resize(kBest, -1);
        for (size_t place = 0; place < kBest; ++place) {
            const size_t at = static_cast<size_t>(latent) * kBest + place;
            CHECK(ids[at] == expected[place]);
            CHECK(counts[at] == (ids[at] < 0 ? 0 : met[static_cast<size_t>(ids[at])]));
        }
    }
}

void check_refusal(Code code) {
    std::vector<double> worth(kRows + 1), least(kLatents);
    std::vector<int32_t> ids(kLatents);
    std::vector<int64_t> counts(kLatents);
    code.idx.back() = kLatents;
    worth.resize(static_cast<size_t>(*std::max_element(code.fired.begin(), code.fired.end())) + 1);
    bool refused = false;
    try {
        saefast::cofiring({code.row_ptr.data(), code.idx.data(), kRows, kLatents},
                          {code.ptr.data(), code.row.data(), 0, kLatents},
                          {code.fired.data(), worth.data(), least.data(), static_cast<int64_t>(worth.size()) - 1}, 1,
                          ids.data(), counts.data(), 3);
    } catch (const std::out_of_range&) {
        refused = true;
    }
    CHECK(refused);
}

}  // namespace

int main() {
    const Code code;
    check_lists(code, 1);
    check_lists(code, 3);
    check_refusal(code);
}
