#include "planner.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace saefast {
namespace {

// SplitMix64 (Steele, Lea and Flood 2014): one add and three multiplies a number, any seed is a good one.
uint64_t splitmix(uint64_t& state) {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Uniform below n by multiply and shift; the bias is under n / 2^64.
uint64_t bounded(uint64_t& state, uint64_t n) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(splitmix(state)) * n) >> 64);
}

}  // namespace

Planner::Planner(std::vector<int64_t> shard_rows, int64_t capacity, int64_t batch, int64_t lag, int64_t epochs,
                 uint64_t seed)
    : shard_rows_(std::move(shard_rows)), capacity_(capacity), batch_(batch), lag_(lag), epochs_(epochs), seed_(seed),
      rng_(seed ^ 0xD1B54A32D192ED03ull) {
    if (batch < 1 || lag < 1 || epochs < 0) throw std::invalid_argument("batch and lag start at 1, epochs at 0");
    if (capacity > INT32_MAX) throw std::invalid_argument("capacity is over 2^31 - 1 rows");
    first_row_.assign(1, 0);
    for (int64_t rows : shard_rows_) {
        if (rows < 0) throw std::invalid_argument("a shard has a negative number of rows");
        first_row_.push_back(first_row_.back() + rows);
    }
    n_rows_ = first_row_.back();
    if (n_rows_ == 0) throw std::invalid_argument("there are no rows");
    // With less, rows of a batch might not have come in yet.
    if (capacity < (lag + 2) * batch)
        throw std::invalid_argument("capacity " + std::to_string(capacity) + " is under (lag + 2) batches = " +
                                    std::to_string((lag + 2) * batch) + " rows");
    begin_epoch(0);
    resident_.assign(static_cast<size_t>(capacity), -1);
    // Most often all slots are of the first epoch: their memory is reserved at once.
    ready_.push_back({0, {}});
    ready_.front().slots.reserve(static_cast<size_t>(std::min(capacity, n_rows_)));
    StreamRow row;
    for (int32_t slot = 0; slot < capacity && next_row(row); ++slot) {
        resident_[static_cast<size_t>(slot)] = row.row;
        make_ready(slot, row.epoch);
    }
}

void Planner::begin_epoch(int64_t epoch) {
    stream_epoch_ = epoch;
    stream_shard_ = stream_row_ = 0;
    order_.resize(shard_rows_.size());
    std::iota(order_.begin(), order_.end(), int64_t{0});
    uint64_t state = seed_ + 0xA0761D6478BD642Full * static_cast<uint64_t>(epoch + 1);
    for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[bounded(state, i)]);
}

bool Planner::next_row(StreamRow& out) {
    while (epochs_ == 0 || stream_epoch_ < epochs_) {
        if (stream_shard_ == static_cast<int64_t>(order_.size())) {
            begin_epoch(stream_epoch_ + 1);
            continue;
        }
        const auto shard = static_cast<size_t>(order_[static_cast<size_t>(stream_shard_)]);
        if (stream_row_ == shard_rows_[shard]) {
            ++stream_shard_;
            stream_row_ = 0;
            continue;
        }
        out = {stream_epoch_, first_row_[shard] + stream_row_++};
        return true;
    }
    return false;
}

void Planner::make_ready(int32_t slot, int64_t epoch) {
    while (ready_.empty() || ready_.back().epoch < epoch)
        ready_.push_back({ready_.empty() ? epoch_ : ready_.back().epoch + 1, {}});
    ready_[static_cast<size_t>(epoch - ready_.front().epoch)].slots.push_back(slot);
}

void Planner::shorten(int64_t n) {
    if (t_ != 0 || n < 0 || n > capacity_)
        throw std::invalid_argument("shorten() comes before the first batch, with at most the capacity");
    std::fill(resident_.begin() + n, resident_.end(), -1);
    for (auto& ready : ready_)
        ready.slots.erase(std::remove_if(ready.slots.begin(), ready.slots.end(), [n](int32_t s) { return s >= n; }),
                          ready.slots.end());
}

// A slot out of the epoch being drawn, by swapping the last one into its place; -1 when nothing at all is left.
int32_t Planner::draw() {
    while (!ready_.empty() && ready_.front().slots.empty()) {
        // Only the end of an epoch leaves it empty: the capacity is large enough that rows are always ready before.
        ready_.pop_front();
        if (!ready_.empty()) epoch_ = ready_.front().epoch;
    }
    if (ready_.empty()) return -1;
    auto& slots = ready_.front().slots;
    const auto at = static_cast<size_t>(bounded(rng_, slots.size()));
    const int32_t slot = slots[at];
    slots[at] = slots.back();
    slots.pop_back();
    return slot;
}

Plan Planner::next(int64_t filled) {
    if (static_cast<int64_t>(refills_.size()) == lag_) {
        const Refill& came = refills_.front();
        const auto n = filled == kAll ? came.slots.size() : static_cast<size_t>(filled);
        for (size_t i = 0; i < n; ++i) make_ready(came.slots[i], came.epochs[i]);
        for (size_t i = n; i < came.slots.size(); ++i) resident_[static_cast<size_t>(came.slots[i])] = -1;
        refills_.pop_front();
    }
    Plan plan;
    plan.slots.reserve(static_cast<size_t>(batch_));
    Refill refill;
    for (int64_t i = 0; i < batch_; ++i) {
        const int32_t slot = draw();
        if (slot < 0) break;
        plan.slots.push_back(slot);
        plan.rows.push_back(resident_[static_cast<size_t>(slot)]);
    }
    StreamRow row;
    for (int32_t slot : plan.slots) {
        resident_[static_cast<size_t>(slot)] = -1;
        if (!next_row(row)) continue;
        plan.refill.push_back(row.row);
        refill.slots.push_back(slot);
        refill.epochs.push_back(row.epoch);
        resident_[static_cast<size_t>(slot)] = row.row;
    }
    refills_.push_back(std::move(refill));
    plan.last = static_cast<int64_t>(plan.slots.size()) < batch_;
    ++t_;
    return plan;
}

void Planner::skip_to(int64_t t) {
    if (t < t_) throw std::invalid_argument("cannot skip back");
    while (t_ < t)
        if (next().slots.empty()) throw std::invalid_argument("the data ends before that position");
}

}  // namespace saefast
