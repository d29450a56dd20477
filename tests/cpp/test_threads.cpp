// parallel_for: covers the range once, hands errors to the caller, stays on one thread for small work, survives fork.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "check.hpp"
#include "threads.hpp"

using saefast::parallel_for;

void covers_the_range_once() {
    for (int64_t n : {0, 1, 2, 7, 16, 17, 1000, 12345}) {
        for (int threads : {1, 2, 3, 16}) {
            std::vector<std::atomic<int>> hits(static_cast<size_t>(n));
            parallel_for(n, threads, [&](int64_t begin, int64_t end) {
                CHECK(0 <= begin && begin < end && end <= n);
                for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
            });
            for (auto& hit : hits) CHECK(hit == 1);
        }
    }
}

void pieces_depend_on_the_sizes_alone() {
    using Pieces = std::set<std::pair<int64_t, int64_t>>;
    auto pieces = [] {
        Pieces seen;
        std::mutex mutex;
        parallel_for(1003, 4, [&](int64_t begin, int64_t end) {
            std::lock_guard<std::mutex> lock(mutex);
            seen.insert({begin, end});
        });
        return seen;
    };
    const Pieces first = pieces();
    CHECK(first.size() == 32);
    for (int i = 0; i < 20; ++i) CHECK(pieces() == first);
}

void small_work_stays_with_the_caller() {
    const auto caller = std::this_thread::get_id();
    auto on_caller = [&](int64_t, int64_t) { CHECK(std::this_thread::get_id() == caller); };
    parallel_for(199, 8, on_caller, 100);
    parallel_for(1 << 20, 1, on_caller);
}

void the_lowest_error_reaches_the_caller() {
    std::atomic<int64_t> done{0};
    std::string caught;
    try {
        parallel_for(320, 4, [&](int64_t begin, int64_t end) {
            done += end - begin;
            if (begin >= 100) throw std::runtime_error(std::to_string(begin));
        });
    } catch (const std::runtime_error& error) {
        caught = error.what();
    }
    CHECK(caught == "100");
    CHECK(done == 320);
}

void a_forked_child_can_go_on() {
    std::atomic<int64_t> sum{0};
    auto add = [&](int64_t begin, int64_t end) { sum += end - begin; };
    parallel_for(1000, 4, add);
    const pid_t child = fork();
    if (child == 0) {
        parallel_for(1000, 4, add);
        _exit(sum == 2000 ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main() {
    covers_the_range_once();
    pieces_depend_on_the_sizes_alone();
    small_work_stays_with_the_caller();
    the_lowest_error_reaches_the_caller();
    a_forked_child_can_go_on();
}
