// The k-th largest of many keys, without sorting them.
#pragma once

#include <cstdint>

namespace saefast {

// The largest t with at least k of n keys >= t; 0 where there are fewer. No key is negative, k >= 1.
int32_t select_kth(const int32_t* keys, int64_t n, int64_t k);

}  // namespace saefast
