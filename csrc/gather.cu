// gather_rows on a CUDA device: blocks stride over the rows, the threads of a block over the bytes of a row, in the
// widest pieces that addresses and row size allow.

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include "gather.hpp"

namespace saefast {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kBlocksPerSm = 16;

template <class Word>
__global__ void gather_rows_kernel(const Word* __restrict__ src, int64_t n_rows, int64_t row_words,
                                   const int64_t* __restrict__ index, int64_t n_index, Word* __restrict__ dst,
                                   long long* first_bad) {
    for (int64_t i = blockIdx.x; i < n_index; i += gridDim.x) {
        const int64_t row = index[i];
        if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(n_rows)) {
            if (threadIdx.x == 0) atomicMin(first_bad, static_cast<long long>(i));
            continue;
        }
        const Word* from = src + row * row_words;
        Word* to = dst + i * row_words;
        for (int64_t w = threadIdx.x; w < row_words; w += blockDim.x) to[w] = from[w];
    }
}

template <class Word>
cudaError_t launch(const void* src, int64_t n_rows, int64_t row_bytes, const int64_t* index, int64_t n_index, void* dst,
                   int64_t* first_bad, cudaStream_t stream) {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t warps = std::min<int64_t>((row_words + 31) / 32, kMaxThreads / 32);
    const int64_t blocks = std::min<int64_t>(n_index, static_cast<int64_t>(multiprocessors) * kBlocksPerSm);
    gather_rows_kernel<Word><<<static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), 0, stream>>>(
        static_cast<const Word*>(src), n_rows, row_words, index, n_index, static_cast<Word*>(dst),
        reinterpret_cast<long long*>(first_bad));
    return cudaGetLastError();
}

}  // namespace

int gather_rows_cuda(const void* src, int64_t n_rows, int64_t row_bytes, const int64_t* index, int64_t n_index,
                     void* dst, int64_t* first_bad, std::uintptr_t stream) {
    if (n_index <= 0 || row_bytes <= 0) return cudaSuccess;
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto fits = reinterpret_cast<std::uintptr_t>(src) | reinterpret_cast<std::uintptr_t>(dst) |
                      static_cast<std::uintptr_t>(row_bytes);
    if (fits % 16 == 0) return launch<uint4>(src, n_rows, row_bytes, index, n_index, dst, first_bad, queue);
    if (fits % 4 == 0) return launch<uint32_t>(src, n_rows, row_bytes, index, n_index, dst, first_bad, queue);
    if (fits % 2 == 0) return launch<uint16_t>(src, n_rows, row_bytes, index, n_index, dst, first_bad, queue);
    return launch<uint8_t>(src, n_rows, row_bytes, index, n_index, dst, first_bad, queue);
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace saefast
