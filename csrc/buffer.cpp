#include "buffer.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

namespace saefast {
namespace {

constexpr int64_t kPieceRows = 1 << 14;

void copy_rows(const char* reservoir, const std::vector<int32_t>& slots, int64_t slot_bytes, char* out) {
    constexpr size_t kAhead = 8;  // rows lie anywhere in memory: fetching a few ahead hides its latency
    const auto bytes = static_cast<size_t>(slot_bytes);
    for (size_t i = 0; i < slots.size(); ++i, out += bytes) {
        if (i + kAhead < slots.size()) {
            const char* next = reservoir + slots[i + kAhead] * slot_bytes;
            for (size_t line = 0; line < bytes && line < 512; line += 64) __builtin_prefetch(next + line);
        }
        std::memcpy(out, reservoir + slots[i] * slot_bytes, bytes);
    }
}

}  // namespace

Buffer::Buffer(std::shared_ptr<RowSource> source, Planner planner, char* reservoir, char* ring, Settings settings)
    : source_(std::move(source)), planner_(std::move(planner)), reservoir_(reservoir), ring_(ring),
      settings_(settings), owner_(::getpid()), next_job_(settings.first_batch),
      places_(static_cast<size_t>(settings.prefetch)), filled_(static_cast<size_t>(settings.lag), 0),
      taken_(static_cast<size_t>(settings.consumers), settings.first_batch) {
    if (settings.prefetch < 2 || settings.consumers < 1)
        throw std::invalid_argument("prefetch starts at 2 (one batch is held while the next is made), consumers at 1");
    planner_.skip_to(settings.first_batch);
    // What stands in the reservoir at that point, sorted so that files are read front to back.
    const auto& resident = planner_.resident();
    first_slots_.reserve(resident.size());
    for (int32_t slot = 0; slot < static_cast<int32_t>(resident.size()); ++slot)
        if (resident[static_cast<size_t>(slot)] >= 0) first_slots_.push_back(slot);
    std::sort(first_slots_.begin(), first_slots_.end(), [&](int32_t a, int32_t b) {
        return resident[static_cast<size_t>(a)] < resident[static_cast<size_t>(b)];
    });
    pieces_ = (static_cast<int64_t>(first_slots_.size()) + kPieceRows - 1) / kPieceRows;
    const int n = std::max(1, settings.threads);
    threads_.reserve(static_cast<size_t>(n));
    try {
        for (int i = 0; i < n; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::exception&) {
        // The system gives no more threads, or no memory for them: those that started do all the work.
        if (threads_.empty()) throw;
    }
}

bool Buffer::lives_here() const { return ::getpid() == owner_; }

void Buffer::close() {
    source_->stop();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
        changed_.notify_all();
    }
    for (auto& thread : threads_)
        if (thread.joinable()) thread.join();
}

void Buffer::fail(const char* message) noexcept {
    source_->stop();
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failed_) {
        try {
            error_ = message;
        } catch (const std::bad_alloc&) {
            error_.clear();  // next() has a message for that
        }
    }
    failed_ = true;
    changed_.notify_all();
}

// An exception that leaves a thread's function ends the process, so none may.
void Buffer::work() noexcept {
    try {
        std::unique_lock<std::mutex> lock(mutex_);
        while (!stopped_ && !failed_ && next_piece_ < pieces_) {
            const int64_t piece = next_piece_++;
            lock.unlock();
            fill_first(piece);
            lock.lock();
        }
        changed_.wait(lock, [&] { return stopped_ || failed_ || pieces_done_ == pieces_; });
        for (;;) {
            changed_.wait(lock, [&] { return stopped_ || failed_ || next_job_ >= end_ || may_start_job(); });
            if (stopped_ || failed_ || next_job_ >= end_) return;
            const int64_t job = next_job_++;
            const Plan plan = start_job(job);
            lock.unlock();
            run_job(job, plan);
            lock.lock();
        }
    } catch (const std::exception& error) {
        fail(error.what());
    } catch (...) {
        fail("a reading thread stopped for an unknown reason");
    }
}

void Buffer::fill_first(int64_t piece) {
    const int64_t begin = piece * kPieceRows;
    const int64_t n = std::min<int64_t>(kPieceRows, static_cast<int64_t>(first_slots_.size()) - begin);
    // The planner does not move on until all pieces are filled.
    std::vector<int64_t> rows(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i)
        rows[static_cast<size_t>(i)] =
            planner_.resident()[static_cast<size_t>(first_slots_[static_cast<size_t>(begin + i)])];
    const int64_t came =
        source_->fill(piece, rows.data(), first_slots_.data() + begin, n, reservoir_, settings_.slot_bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    first_filled_ += came;
    if (++pieces_done_ < pieces_) return;
    if (first_filled_ < static_cast<int64_t>(first_slots_.size()) && !stopped_) planner_.shorten(first_filled_);
    first_slots_ = {};
    changed_.notify_all();
}

// Whether next_job_ has a free place in the ring, and job next_job_ - lag is done. A consumer holds the batch before the
// one it asks for next, so the place of that batch is not free yet. The caller holds the lock.
bool Buffer::may_start_job() const {
    const int64_t held = *std::min_element(taken_.begin(), taken_.end()) - 1;
    return next_job_ < std::max(held, settings_.first_batch) + settings_.prefetch &&
           filled_[static_cast<size_t>(next_job_ % settings_.lag)] >= 0;
}

// Called in the order of jobs, by whoever holds the lock.
Plan Buffer::start_job(int64_t job) {
    int64_t& filled = filled_[static_cast<size_t>(job % settings_.lag)];
    // At a resumed position, rows of the refills under way came with the first fill.
    Plan plan = planner_.next(job - settings_.first_batch < settings_.lag ? Planner::kAll : filled);
    filled = -1;
    if (plan.last) end_ = plan.slots.empty() ? job : job + 1;
    places_[static_cast<size_t>(job % settings_.prefetch)] = {job, plan.rows, false};
    changed_.notify_all();
    return plan;
}

void Buffer::run_job(int64_t job, const Plan& plan) {
    const auto place = static_cast<size_t>(job % settings_.prefetch);
    copy_rows(reservoir_, plan.slots, settings_.slot_bytes,
              ring_ + static_cast<int64_t>(place) * settings_.batch * settings_.slot_bytes);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        places_[place].ready = true;
        changed_.notify_all();
    }
    const int64_t came = source_->fill(pieces_ + job - settings_.first_batch, plan.refill.data(), plan.slots.data(),
                                       static_cast<int64_t>(plan.refill.size()), reservoir_, settings_.slot_bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    filled_[static_cast<size_t>(job % settings_.lag)] = came;
    changed_.notify_all();
}

bool Buffer::next(int consumer, int timeout_ms, Batch& out) {
    if (!lives_here())
        throw std::runtime_error("this buffer's threads live in the process that made it: open it anew after a fork");
    std::unique_lock<std::mutex> lock(mutex_);
    int64_t& number = taken_.at(static_cast<size_t>(consumer));
    const auto& place = places_[static_cast<size_t>(number % settings_.prefetch)];
    const auto ready = [&] { return place.job == number && place.ready; };
    const auto settled = [&] { return failed_ || stopped_ || number >= end_ || ready(); };
    if (!changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), settled)) return false;
    if (failed_) throw std::runtime_error(error_.empty() ? "a reading thread ran out of memory" : error_);
    if (stopped_) throw std::runtime_error("the buffer is closed");
    if (number >= end_) {
        out = Batch{};
        return true;
    }
    out = {number, static_cast<int64_t>(place.rows.size()), number % settings_.prefetch};
    ++number;
    changed_.notify_all();
    return true;
}

std::vector<int64_t> Buffer::rows(int64_t place) {
    std::lock_guard<std::mutex> lock(mutex_);
    return places_.at(static_cast<size_t>(place)).rows;
}

}  // namespace saefast
