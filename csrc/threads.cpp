#include "threads.hpp"

#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace saefast {
namespace {

#if defined(__linux__)
// How compiled OpenMP code calls its runtime, in GNU's libgomp and in LLVM's and Intel's libomp: part of their ABI.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned n_threads, unsigned flags);

const auto gomp_parallel = reinterpret_cast<GompParallel>(::dlsym(RTLD_DEFAULT, "GOMP_parallel"));

// OpenMP's threads do not survive a fork, and a child that asks for them hangs: there plain threads do the work.
const pid_t loaded_in = ::getpid();
#endif

}  // namespace

void run_on_threads(int64_t n_threads, void (*work)(void*) noexcept, void* data) {
#if defined(__linux__)
    if (gomp_parallel != nullptr && ::getpid() == loaded_in)
        return gomp_parallel(work, data, static_cast<unsigned>(n_threads), 0);
#endif
    std::vector<std::thread> threads;
    try {
        threads.reserve(static_cast<size_t>(n_threads - 1));
        while (static_cast<int64_t>(threads.size()) < n_threads - 1) threads.emplace_back(work, data);
    } catch (const std::exception&) {
        // The system gives no more threads, or no memory for them: those that started do all the work.
    }
    work(data);
    for (auto& thread : threads) thread.join();
}

}  // namespace saefast
