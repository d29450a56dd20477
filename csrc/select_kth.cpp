#include "select_kth.hpp"

#include <array>
#include <cstddef>

namespace saefast {
namespace {

// Shifts and widths of a key's 31 bits, the highest first.
struct Digit {
    int shift, bits;
};
constexpr Digit kDigits[] = {{20, 11}, {10, 10}, {0, 10}};

}  // namespace

// Radix select: a histogram of the highest digit says which value it has in the answer, and so on with the keys that
// have that value.
int32_t select_kth(const int32_t* keys, int64_t n, int64_t k) {
    if (n < k) return 0;
    int32_t found = 0;
    for (const Digit digit : kDigits) {
        std::array<int64_t, 1 << 11> count{};
        const int known = digit.shift + digit.bits;
        for (int64_t i = 0; i < n; ++i)
            if (int64_t{keys[i]} >> known == int64_t{found} >> known)
                ++count[static_cast<size_t>(keys[i] >> digit.shift & ((1 << digit.bits) - 1))];
        int32_t value = (1 << digit.bits) - 1;
        while (count[static_cast<size_t>(value)] < k) k -= count[static_cast<size_t>(value--)];
        found |= value << digit.shift;
    }
    return found;
}

}  // namespace saefast
