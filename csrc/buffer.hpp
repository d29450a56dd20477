// The shuffle buffer: threads keep a reservoir of rows full and the next batches ready while training runs.
//
// Every batch is a job: copy its rows out of their slots into a place of the ring, then read the rows that come next
// into those slots. Jobs start in order, run side by side, and job t starts once job t - lag is done, so what a batch
// holds never depends on timing. Batches go to `consumers` readers, each at its own pace; a place in the ring is free once
// the slowest is done with it.
// The memory of reservoir and ring belongs to the caller (torch makes it, pinned where CUDA is).
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "planner.hpp"
#include "rows_source.hpp"

namespace saefast {

struct Batch {
    int64_t number = -1;  // -1: the data has ended
    int64_t n_rows = 0;
    int64_t place = 0;  // which of the ring's places it lies in
};

class Buffer {
  public:
    struct Settings {
        int64_t slot_bytes, capacity, batch, lag, prefetch;
        int threads, consumers;
        int64_t first_batch;  // where a resumed run goes on
    };

    // reservoir: capacity * slot_bytes; ring: prefetch * batch * slot_bytes.
    Buffer(std::shared_ptr<RowSource> source, Planner planner, char* reservoir, char* ring, Settings settings);
    // Joins the threads.
    ~Buffer() { close(); }
    Buffer(const Buffer&) = delete;

    // The consumer's next batch, which also gives its last one back. False when timeout_ms passed without one.
    // Throws the error that a reader met, and in every process but the one that made the buffer.
    bool next(int consumer, int timeout_ms, Batch& out);
    // Rows, counted through the shards in file order, of a batch that the consumer holds.
    std::vector<int64_t> rows(int64_t place);
    // Ends the threads; next() then throws.
    void close();
    // Whether this process has the threads. In a forked child they are gone and their locks may be held for ever, so
    // there a Buffer must be left alone, its memory included.
    bool lives_here() const;

  private:
    void work() noexcept;
    void fill_first(int64_t piece);
    bool may_start_job() const;
    Plan start_job(int64_t job);
    void run_job(int64_t job, const Plan& plan);
    void fail(const char* message) noexcept;

    std::shared_ptr<RowSource> source_;
    Planner planner_;
    char *reservoir_, *ring_;
    Settings settings_;
    pid_t owner_;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::thread> threads_;
    bool stopped_ = false, failed_ = false;
    std::string error_;

    // the first fill, in pieces
    std::vector<int32_t> first_slots_;
    int64_t pieces_ = 0, next_piece_ = 0, pieces_done_ = 0, first_filled_ = 0;

    int64_t next_job_;
    int64_t end_ = INT64_MAX;  // number of batches, once known
    struct Place {
        int64_t job = -1;
        std::vector<int64_t> rows;
        bool ready = false;
    };
    std::vector<Place> places_;
    std::vector<int64_t> filled_;  // of the jobs of the last lag batches: rows refilled, -1 while under way
    std::vector<int64_t> taken_;   // per consumer: the batch it asks for next
};

}  // namespace saefast
