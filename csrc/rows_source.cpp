#include "rows_source.hpp"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>

namespace saefast {

struct FileSource::File {
    std::string path;
    int descriptor;
    File(std::string path_, int fd) : path(std::move(path_)), descriptor(fd) {}
    ~File() { ::close(descriptor); }
    File(const File&) = delete;
};

FileSource::FileSource(std::vector<Shard> shards, std::vector<int64_t> column_bytes)
    : shards_(std::move(shards)), column_bytes_(std::move(column_bytes)) {
    first_row_.assign(1, 0);
    for (const auto& shard : shards_) {
        if (shard.columns.size() != column_bytes_.size())
            throw std::invalid_argument("every shard needs a file and an offset for each column");
        first_row_.push_back(first_row_.back() + shard.rows);
    }
}

FileSource::~FileSource() = default;

// A handful of files stay open: the stream is in those of one or two shards, and a resumed reservoir visits each once.
std::shared_ptr<FileSource::File> FileSource::open(const std::string& path) {
    const size_t most = std::max<size_t>(16, 2 * column_bytes_.size());
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& file : open_)
        if (file->path == path) return file;
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
    auto file = std::make_shared<File>(path, descriptor);
#ifdef POSIX_FADV_SEQUENTIAL
    ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
    if (open_.size() == most) open_.pop_front();
    open_.push_back(file);
    return file;
}

// n consecutive rows of one column, from row `first` of the shard, scattered over the slots by one system call per
// IOV_MAX rows.
void FileSource::read(const File& file, const Shard& shard, size_t column, int64_t first, const int32_t* slots,
                      int64_t n, char* storage, int64_t slot_bytes) const {
    constexpr int64_t kVectors = IOV_MAX < 1024 ? IOV_MAX : 1024;
    const int64_t bytes = column_bytes_[column];
    int64_t place = 0;
    for (size_t c = 0; c < column; ++c) place += column_bytes_[c];
    iovec vectors[kVectors];
    for (int64_t start = 0; start < n; start += kVectors) {
        const int64_t count = std::min(kVectors, n - start);
        for (int64_t i = 0; i < count; ++i)
            vectors[i] = {storage + slots[start + i] * slot_bytes + place, static_cast<size_t>(bytes)};
        int64_t offset = shard.columns[column].offset + (first + start) * bytes;
        iovec* left = vectors;
        auto left_count = static_cast<int>(count);
        while (left_count > 0) {
            const ssize_t got = ::preadv(file.descriptor, left, left_count, offset);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0)
                throw std::runtime_error(file.path + (got == 0 ? ": ends at byte " : ": cannot be read at byte ") +
                                         std::to_string(offset) +
                                         (got == 0 ? ", its index promises " + std::to_string(shard.rows) + " rows"
                                                   : std::string(": ") + std::strerror(errno)));
            offset += got;
            auto done = static_cast<size_t>(got);
            while (left_count > 0 && done >= left->iov_len) {
                done -= left->iov_len;
                ++left;
                --left_count;
            }
            if (left_count > 0) {
                left->iov_base = static_cast<char*>(left->iov_base) + done;
                left->iov_len -= done;
            }
        }
    }
}

int64_t FileSource::fill(int64_t, const int64_t* rows, const int32_t* slots, int64_t n, char* storage,
                         int64_t slot_bytes) {
    for (int64_t start = 0; start < n;) {
        const auto above = std::upper_bound(first_row_.begin(), first_row_.end(), rows[start]);
        const auto shard = static_cast<size_t>(above - first_row_.begin()) - 1;
        int64_t end = start + 1;
        while (end < n && rows[end] == rows[end - 1] + 1 && rows[end] < first_row_[shard + 1]) ++end;
        for (size_t column = 0; column < column_bytes_.size(); ++column)
            read(*open(shards_[shard].columns[column].path), shards_[shard], column, rows[start] - first_row_[shard],
                 slots + start, end - start, storage, slot_bytes);
        start = end;
    }
    return n;
}

bool QueueSource::push(const char* rows, int64_t n, int timeout_ms) {
    std::vector<char> block(rows, rows + n * row_bytes_);
    std::unique_lock<std::mutex> lock(mutex_);
    const bool room = changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                                        [&] { return stopped_ || queued_ < room_; });
    if (!room || stopped_) return false;
    blocks_.push_back(std::move(block));
    queued_ += n;
    changed_.notify_all();
    return true;
}

void QueueSource::finish(const std::string& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    finished_ = true;
    error_ = error;
    changed_.notify_all();
}

// Calls take rows in the order of their tickets, whichever thread comes first.
int64_t QueueSource::fill(int64_t ticket, const int64_t*, const int32_t* slots, int64_t n, char* storage,
                          int64_t slot_bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stopped_ || turn_ == ticket; });
    int64_t done = 0;
    while (done < n) {
        changed_.wait(lock, [&] { return stopped_ || finished_ || queued_ > 0; });
        if (stopped_ || queued_ == 0) break;
        const auto& block = blocks_.front();
        const int64_t rows = static_cast<int64_t>(block.size()) / row_bytes_;
        for (; taken_ < rows && done < n; ++taken_, ++done, --queued_)
            std::memcpy(storage + slots[done] * slot_bytes, block.data() + taken_ * row_bytes_,
                        static_cast<size_t>(row_bytes_));
        if (taken_ == rows) {
            blocks_.pop_front();
            taken_ = 0;
        }
        changed_.notify_all();
    }
    const bool failed = done < n && !stopped_ && !error_.empty();
    ++turn_;
    changed_.notify_all();
    if (failed) throw std::runtime_error(error_);
    return done;
}

void QueueSource::stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
}

}  // namespace saefast
