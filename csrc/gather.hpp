// Rows of one or several matrices, drawn by index: how training takes shuffled batches out of stored activations.
// A row is row_bytes bytes of any type. No torch, no Python, no CUDA types.
#pragma once

#include <cstdint>

namespace saefast {

// dst[i] = src[index[i]]. src holds n_rows rows, dst n_index; they do not overlap. n_threads <= 0: one per core.
// Throws std::out_of_range naming the position and the value of the first index outside [0, n_rows), nothing written.
void gather_rows(const void* src, int64_t n_rows, int64_t row_bytes, const int64_t* index, int64_t n_index, void* dst,
                 int n_threads);

// The same from n_sources matrices that count as one: source s holds rows first_row[s] up to first_row[s + 1].
// first_row has n_sources + 1 entries, starts at 0 and never descends (std::invalid_argument otherwise); a source may
// be empty.
void gather_rows_from(const void* const* sources, const int64_t* first_row, int64_t n_sources, int64_t row_bytes,
                      const int64_t* index, int64_t n_index, void* dst, int n_threads);

#ifdef SAEFAST_CUDA
// The same for device memory, queued on `stream` (a cudaStream_t as an integer; 0 is the default stream).
// *first_bad (device, set by the caller to n_index or more) becomes the lowest position whose index is outside
// [0, n_rows); such rows are not written. Returns a cudaError_t.
int gather_rows_cuda(const void* src, int64_t n_rows, int64_t row_bytes, const int64_t* index, int64_t n_index,
                     void* dst, int64_t* first_bad, std::uintptr_t stream);

const char* cuda_error_text(int error);
#endif

}  // namespace saefast
