// Which latents fire on the same rows: for each of some latents, how many rows it shares with any other, and the n others
// that count most.
#pragma once

#include <cstdint>

namespace saefast {

// The sparse code of all rows: row r has the latents idx[row_ptr[r]] to idx[row_ptr[r + 1]] (exclusive), distinct.
struct CodeOfRows {
    const int64_t* row_ptr;  // (n_rows + 1,)
    const int32_t* idx;      // (row_ptr[n_rows],)
    int64_t n_rows, n_latents;
};

// Latents first to first + n: the i-th fires on the rows row[ptr[i]] to row[ptr[i + 1]].
struct RowsOfLatents {
    const int64_t* ptr;  // (n + 1,)
    const int64_t* row;  // (ptr[n],)
    int64_t first, n;
};

// How pairs are ranked: latent j, met on c rows, by worth[c] / n_fired[j], and only where that is above least[i].
struct PairRank {
    const int64_t* n_fired;  // (n_latents,)
    const double* worth;     // (longest + 1,), of the most rows of a latent
    const double* least;     // (n,)
    int64_t longest;
};

// Writes ids and counts (n, best): the `best` others of each latent, the highest rank first, the lower latent first
// among equals; -1 and 0 where there are fewer. Scratch is 4 bytes for each latent of the dictionary, on each thread.
// Throws out_of_range for a row or latent that is not there, invalid_argument for pointers that do not ascend.
void cofiring(const CodeOfRows& code, const RowsOfLatents& latents, const PairRank& rank, int64_t best, int32_t* ids,
              int64_t* counts, int n_threads);

}  // namespace saefast
