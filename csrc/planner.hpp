// Which rows make which batch: all decisions of the shuffle buffer, none of its reading or copying.
//
// Rows stream in epoch after epoch; shards come in an order drawn anew for each epoch, rows of a shard in file order.
// A reservoir of `capacity` slots holds the next rows of that stream. Batch t draws `batch` slots without replacement,
// uniformly from what is ready; the slots it frees take the next rows of the stream, ready again for batch t + lag.
// So the reservoir is refilled all the time and stays full but for lag batches. All rows of an epoch are drawn before
// the first of the next epoch, which come in meanwhile: every row appears exactly once an epoch, and no batch waits
// where two epochs meet.
//
// The plan depends on the arguments alone, never on threads or timing: the same seed gives the same batches, and a
// position is found again by planning up to it, which reads no data.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

namespace saefast {

// A row of the stream: `row` counts through the shards in file order (shard 0's rows first).
struct StreamRow {
    int64_t epoch;
    int64_t row;
};

struct Plan {
    std::vector<int32_t> slots;   // the slots that make the batch, in batch order
    std::vector<int64_t> rows;    // what they hold: rows counted through the shards in file order
    std::vector<int64_t> refill;  // the rows that slots[0], slots[1], ... take next; may be fewer than slots
    bool last = false;            // nothing is left after this batch
};

class Planner {
  public:
    // epochs 0 is endless. A stream whose length is not known beforehand has one shard of kUnknown rows.
    static constexpr int64_t kUnknown = INT64_MAX / 2;

    Planner(std::vector<int64_t> shard_rows, int64_t capacity, int64_t batch, int64_t lag, int64_t epochs,
            uint64_t seed);

    // The next batch. `filled` says how many rows of the refill of batch t - lag really came (a live stream may end);
    // batches before lag have none.
    Plan next(int64_t filled);
    Plan next() { return next(kAll); }

    // The stream was shorter than the slots it was to fill: only the first n rows came. Before the first batch.
    void shorten(int64_t n);

    // Plans up to batch t and forgets: afterwards next() is batch t.
    void skip_to(int64_t t);

    int64_t position() const { return t_; }
    int64_t epoch() const { return epoch_; }
    // What each slot holds or is about to (-1: nothing). At first slots 0, 1, ... in the order of the stream.
    const std::vector<int64_t>& resident() const { return resident_; }

    static constexpr int64_t kAll = -1;

  private:
    struct Ready {
        int64_t epoch;
        std::vector<int32_t> slots;
    };
    struct Refill {
        std::vector<int32_t> slots;
        std::vector<int64_t> epochs;
    };

    bool next_row(StreamRow& out);
    void begin_epoch(int64_t epoch);
    void make_ready(int32_t slot, int64_t epoch);
    int32_t draw();

    std::vector<int64_t> shard_rows_, first_row_;
    int64_t n_rows_ = 0, capacity_, batch_, lag_, epochs_;
    uint64_t seed_, rng_;
    int64_t t_ = 0, epoch_ = 0;

    // where the stream stands
    int64_t stream_epoch_ = 0, stream_shard_ = 0, stream_row_ = 0;
    std::vector<int64_t> order_;

    std::vector<int64_t> resident_;
    std::deque<Ready> ready_;     // by epoch, the one being drawn first
    std::deque<Refill> refills_;  // of the last lag batches
};

}  // namespace saefast
