// Where the shuffle buffer's rows come from: files that are read in place, or a queue that somebody pushes into.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace saefast {

// Fills slots of a reservoir with rows of the stream. Called from several threads at once.
class RowSource {
  public:
    virtual ~RowSource() = default;
    // Puts rows[i] into the slot at storage + slots[i] * slot_bytes, for i < n. `ticket` counts the calls that the plan
    // asks for, in its order. Returns how many of them there were: fewer than n only where a live stream has ended.
    virtual int64_t fill(int64_t ticket, const int64_t* rows, const int32_t* slots, int64_t n, char* storage,
                         int64_t slot_bytes) = 0;
    // Makes every call that waits, now or later, return at once.
    virtual void stop() {}
};

// A row's bytes lie in pieces, the columns, each a matrix of its own in some file: the activations of a hook, their
// scales, those of another hook in a file beside it. A slot holds a row's pieces one after another.
struct Column {
    std::string path;
    int64_t offset;  // where the matrix starts in the file
};

struct Shard {
    int64_t rows;
    std::vector<Column> columns;
};

// Reads with preadv straight into the slots. Throws std::runtime_error naming file and offset.
class FileSource : public RowSource {
  public:
    FileSource(std::vector<Shard> shards, std::vector<int64_t> column_bytes);
    ~FileSource() override;
    int64_t fill(int64_t ticket, const int64_t* rows, const int32_t* slots, int64_t n, char* storage,
                 int64_t slot_bytes) override;

  private:
    struct File;
    std::shared_ptr<File> open(const std::string& path);
    void read(const File& file, const Shard& shard, size_t column, int64_t first, const int32_t* slots, int64_t n,
              char* storage, int64_t slot_bytes) const;

    std::vector<Shard> shards_;
    std::vector<int64_t> column_bytes_, first_row_;
    std::mutex mutex_;
    std::deque<std::shared_ptr<File>> open_;  // most recently used last
};

// Rows that are pushed in, in order. push() waits while `room` rows or more stand in the queue.
class QueueSource : public RowSource {
  public:
    QueueSource(int64_t row_bytes, int64_t room) : row_bytes_(row_bytes), room_(room) {}
    // Copies n rows in, as soon as there is room; false after timeout_ms without, or when stopped. Not both at once:
    // push() and finish() belong to one thread.
    bool push(const char* rows, int64_t n, int timeout_ms);
    // No more rows will come; with a message, because something went wrong, which fill() then throws.
    void finish(const std::string& error);
    int64_t fill(int64_t ticket, const int64_t* rows, const int32_t* slots, int64_t n, char* storage,
                 int64_t slot_bytes) override;
    void stop() override;

  private:
    int64_t row_bytes_, room_, queued_ = 0, turn_ = 0;
    bool finished_ = false, stopped_ = false;
    std::string error_;
    std::deque<std::vector<char>> blocks_;
    int64_t taken_ = 0;  // rows already taken off the first block
    std::mutex mutex_;
    std::condition_variable changed_;
};

}  // namespace saefast
