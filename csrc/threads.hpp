// parallel_for: pieces of a range handed out to threads, which are torch's own where torch is in the process.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

// Put before a hot loop's function: the compiler writes one body per instruction set and the loader picks at run time,
// so that one wheel is fast on every x86. Not with sanitizers, which start after the loader has called the picker.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SAEFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SAEFAST_CLONES
#endif

namespace saefast {

// n_threads <= 0 asks for one per core.
inline int resolve_threads(int n_threads) {
    if (n_threads > 0) return n_threads;
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// How many threads pay for n items: each gets at least `grain`, whose work costs about as much as starting a thread.
inline int64_t threads_for(int64_t n, int n_threads, int64_t grain) {
    const int64_t worth = std::max<int64_t>(1, n / std::max<int64_t>(grain, 1));
    return std::min<int64_t>(resolve_threads(n_threads), worth);
}

// Calls work(data) on up to n_threads threads at once, the caller's included, and returns when all are done. They are
// the OpenMP runtime's, if one is in the process: torch brings it, and its threads spin for milliseconds after every
// torch operation. Threads of our own would have to share the cores with them. Elsewhere std::threads, started and
// joined here. `work` must not throw.
void run_on_threads(int64_t n_threads, void (*work)(void*) noexcept, void* data);

// Calls fn(begin, end) on contiguous pieces that cover [0, n), on at most n_threads threads, the caller's included, and
// returns when all are done. Pieces are handed out one by one, so the caller works while the other threads start; they
// depend on n, n_threads and grain alone, and any thread may take any of them. Work under two grains stays on the
// caller's thread.
// If pieces throw, the exception of the lowest is rethrown here, after all have ended.
template <class Fn>
void parallel_for(int64_t n, int n_threads, const Fn& fn, int64_t grain = 1) {
    if (n <= 0) return;
    const int64_t n_workers = threads_for(n, n_threads, grain);
    if (n_workers == 1) return fn(int64_t{0}, n);

    const int64_t pieces = std::min<int64_t>(n, 8 * n_workers);
    const int64_t size = n / pieces, rest = n % pieces;
    std::atomic<int64_t> next{0};
    std::vector<std::exception_ptr> errors(static_cast<size_t>(pieces));
    auto work = [&]() noexcept {
        for (int64_t piece = next++; piece < pieces; piece = next++) {
            const int64_t begin = size * piece + std::min(piece, rest);
            try {
                fn(begin, begin + size + (piece < rest ? 1 : 0));
            } catch (...) {
                errors[static_cast<size_t>(piece)] = std::current_exception();
            }
        }
    };

    run_on_threads(n_workers, [](void* data) noexcept { (*static_cast<decltype(work)*>(data))(); }, &work);
    for (const auto& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace saefast
