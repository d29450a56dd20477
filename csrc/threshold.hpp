// Threshold encoder on the CPU: every pre-activation above its latent's threshold, as CSR with exact counts.
#pragma once

#include <cstdint>
#include <vector>

#include "encode.hpp"

namespace saefast {

// The rows' entries, found and kept until the caller has room for them.
class ThresholdCode {
  public:
    // encoder.threshold must be set; max_scratch_bytes bounds the packed rows, not the entries found. kernel and
    // n_threads as in TopK. A latent is on where pre > threshold; NaN counts as on.
    ThresholdCode(const Encoder& encoder, int64_t max_scratch_bytes, const char* kernel, int n_threads);

    int64_t size() const;
    int64_t n_rows() const { return static_cast<int64_t>(rows_.size()); }
    // row_ptr (n_rows + 1), idx and acts (size()): latents ascend within a row.
    void write(int64_t* row_ptr, int32_t* idx, float* acts) const;

  private:
    friend class ThresholdSink;
    struct Entry {
        int32_t id;
        float pre;
    };
    using List = std::vector<Entry>;

    void encode_rows(const Encoder& encoder, const TileKernel& kernel, int64_t first_row, int64_t n_rows,
                     int n_threads);

    // [row][range of latents]: appended in ascending order by one thread each.
    std::vector<std::vector<List>> rows_;
};

}  // namespace saefast
