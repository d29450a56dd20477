// gather_rows and gather_rows_from under the sanitizers: every byte right, none read or written outside.

#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "gather.hpp"

namespace {

std::mt19937_64 rng(7);

std::vector<unsigned char> random_bytes(int64_t n) {
    std::vector<unsigned char> bytes(static_cast<size_t>(n));
    for (auto& byte : bytes) byte = static_cast<unsigned char>(rng());
    return bytes;
}

std::vector<int64_t> random_index(int64_t n, int64_t n_rows) {
    std::vector<int64_t> index(static_cast<size_t>(n));
    for (auto& row : index) row = static_cast<int64_t>(rng() % static_cast<uint64_t>(n_rows));
    return index;
}

void check_rows(const std::vector<unsigned char>& src, const std::vector<int64_t>& index, int64_t row_bytes,
                const std::vector<unsigned char>& dst) {
    if (row_bytes == 0) return;
    for (size_t i = 0; i < index.size(); ++i)
        CHECK(std::memcmp(dst.data() + i * row_bytes, src.data() + index[i] * row_bytes, row_bytes) == 0);
}

void one_source(int64_t n_rows, int64_t row_bytes, int64_t n) {
    const auto src = random_bytes(n_rows * row_bytes);
    const auto index = random_index(n, n_rows);
    std::vector<unsigned char> dst(static_cast<size_t>(n * row_bytes));
    saefast::gather_rows(src.data(), n_rows, row_bytes, index.data(), n, dst.data(), 4);
    check_rows(src, index, row_bytes, dst);
}

// Each source in an allocation of its own, so that one byte too many is seen.
void several_sources(const std::vector<int64_t>& lengths, int64_t row_bytes, int64_t n) {
    std::vector<std::vector<unsigned char>> parts;
    std::vector<const void*> sources;
    std::vector<int64_t> first_row{0};
    std::vector<unsigned char> whole;
    for (int64_t length : lengths) {
        parts.push_back(random_bytes(length * row_bytes));
        first_row.push_back(first_row.back() + length);
        whole.insert(whole.end(), parts.back().begin(), parts.back().end());
    }
    for (const auto& part : parts) sources.push_back(part.data());
    const auto index = random_index(n, first_row.back());
    std::vector<unsigned char> dst(static_cast<size_t>(n * row_bytes));
    saefast::gather_rows_from(sources.data(), first_row.data(), static_cast<int64_t>(lengths.size()), row_bytes,
                              index.data(), n, dst.data(), 4);
    check_rows(whole, index, row_bytes, dst);
}

void out_of_range_writes_nothing() {
    const auto src = random_bytes(10 * 8);
    auto index = random_index(100, 10);
    index[99] = 10;
    std::vector<unsigned char> dst(800, 7);
    bool thrown = false;
    try {
        saefast::gather_rows(src.data(), 10, 8, index.data(), 100, dst.data(), 2);
    } catch (const std::out_of_range&) {
        thrown = true;
    }
    CHECK(thrown);
    for (unsigned char byte : dst) CHECK(byte == 7);
}

void wrong_tables_are_refused() {
    const auto src = random_bytes(9 * 4);
    const std::vector<const void*> sources(2, src.data());
    const int64_t index = 0;
    std::vector<unsigned char> dst(4, 7);
    for (const std::vector<int64_t>& first_row : std::vector<std::vector<int64_t>>{{1, 3}, {0, 3, 2}}) {
        bool thrown = false;
        try {
            saefast::gather_rows_from(sources.data(), first_row.data(), static_cast<int64_t>(first_row.size()) - 1, 4,
                                      &index, 1, dst.data(), 1);
        } catch (const std::invalid_argument&) {
            thrown = true;
        }
        CHECK(thrown);
    }
    for (unsigned char byte : dst) CHECK(byte == 7);
}

}  // namespace

int main() {
    for (int64_t row_bytes : {1, 2, 63, 64, 100, 768, 4608}) one_source(333, row_bytes, 2000);
    one_source(500, 4096, 3000);
    one_source(5, 0, 100);
    several_sources({3, 0, 500, 1, 0}, 1000, 6000);
    several_sources({1}, 1, 10);
    out_of_range_writes_nothing();
    wrong_tables_are_refused();
}
