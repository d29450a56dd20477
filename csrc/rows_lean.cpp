// The lean row optimiser: bf16 weights with stochastic rounding, 8-bit first moments, one second moment a row.
// A row is widened into buffers, treated as Adam treats it, and rounded back.

#include <cstring>

#include "rows_detail.hpp"

namespace saefast {
namespace {

using namespace detail;

// Keeps the rounding of a normalised row apart from that of the update of the same step.
constexpr uint32_t kNormalised = 0x5851F42Du;

uint32_t key_of(const LeanMatrix& a, int64_t r, int32_t step, uint32_t salt = 0) {
    const uint32_t when = rowmath::mix(a.seed + static_cast<uint32_t>(step) * 0x9E3779B9u + salt);
    return rowmath::mix(when ^ (static_cast<uint32_t>(r) * 0x85EBCA6Bu));
}

float widen(uint16_t x) {
    float value;
    rowmath::from_bf16(&value, &x, 1);
    return value;
}

// The bf16 at or above x >= 0, so that x / scale never exceeds its bound.
uint16_t bf16_above(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>((bits + 0xFFFFu) >> 16);
}

// A row's weights and first moment in fp32.
struct Wide {
    float* w;
    float* m;
};

int64_t block_width(const LeanMatrix& a) { return (a.d + a.blocks - 1) / a.blocks; }

void load_moment(const LeanMatrix& a, int64_t r, float* m) {
    const int64_t width = block_width(a);
    for (int64_t b = 0; b < a.blocks; ++b) {
        const int64_t first = std::min(b * width, a.d), n = std::min(width, a.d - first);
        rowmath::from_int8(m + first, a.m + r * a.d + first, widen(a.scale[r * a.blocks + b]), n);
    }
}

void store_moment(const LeanMatrix& a, int64_t r, const float* m, uint32_t key) {
    const int64_t width = block_width(a);
    for (int64_t b = 0; b < a.blocks; ++b) {
        const int64_t first = std::min(b * width, a.d), n = std::min(width, a.d - first);
        const uint16_t scale = bf16_above(rowmath::abs_max(m + first, n) / 127.0f);
        a.scale[r * a.blocks + b] = scale;
        // A block of zeros, or of values too small for a normal scale, is stored as zeros.
        const float inverse = widen(scale) < 1.17549435e-38f ? 0.0f : 1.0f / widen(scale);
        rowmath::to_int8_stochastic(a.m + r * a.d + first, m + first, inverse, key, first, n);
    }
}

void store_weights(const LeanMatrix& a, int64_t r, const float* w, uint32_t key) {
    rowmath::to_bf16_stochastic(a.w + r * a.d, w, key, a.d);
    if (a.norms != nullptr) a.norms[r] = std::sqrt(rowmath::dot(w, w, a.d));
}

// Adds the drift up to `until` to the row in `wide`. Its moments' decay is returned for the caller to apply.
float add_drift(const LeanMatrix& a, const AdamStep& s, int64_t r, int32_t until, const Wide& wide) {
    const int32_t since = a.last_step[r];
    if (since >= until) return 1.0f;
    if (s.norm == Norm::before_update) to_unit_norm(wide.w, a.d);
    const float root = std::sqrt(a.v[r]) + static_cast<float>(s.drift_eps[since]);
    rowmath::add_scaled(wide.w, wide.m, -static_cast<float>(s.drift[since]) / root, a.d);
    if (s.norm == Norm::after_update) to_unit_norm(wide.w, a.d);
    a.v[r] *= static_cast<float>(std::pow(s.beta2, until - since));
    a.last_step[r] = until;
    return static_cast<float>(std::pow(s.beta1, until - since));
}

void catch_up_row(const LeanMatrix& a, const AdamStep& s, int64_t r, const Wide& wide) {
    if (a.last_step[r] >= s.step) return;
    rowmath::from_bf16(wide.w, a.w + r * a.d, a.d);
    load_moment(a, r, wide.m);
    const float decay = add_drift(a, s, r, s.step, wide);
    // Only the scales shrink: the 8-bit values stay, so a row that is left alone loses no precision.
    for (int64_t b = r * a.blocks; b < (r + 1) * a.blocks; ++b) {
        const float scale = widen(a.scale[b]) * decay;
        rowmath::to_bf16(a.scale + b, &scale, 1);
    }
    store_weights(a, r, wide.w, key_of(a, r, s.step));
}

// Row i of a job.
void update_row(const LeanJob& job, const rowmath::AdamConstants& c, int64_t i, float* grad) {
    const LeanMatrix& a = job.matrix;
    const AdamStep& s = job.step;
    const int64_t r = row_at(job.rows, i);
    const Wide wide{grad + a.d, grad + 2 * a.d};
    rowmath::from_bf16(wide.w, a.w + r * a.d, a.d);
    load_moment(a, r, wide.m);
    rowmath::scale(wide.m, add_drift(a, s, r, s.step - 1, wide), a.d);
    add_along(job.gradient, i, wide.w, a.d, grad);
    if (s.norm == Norm::before_update) to_unit_norm(wide.w, a.d);
    if (s.project) project_out(grad, wide.w, a.d);
    if (job.squares != nullptr) job.squares[i] = rowmath::dot(grad, grad, a.d);
    if (s.grad_scale != 1.0f) rowmath::scale(grad, s.grad_scale, a.d);
    const float mean_square = rowmath::dot(grad, grad, a.d) / static_cast<float>(a.d);
    a.v[r] = c.beta2 * a.v[r] + c.one_minus_beta2 * mean_square;
    const float root = std::sqrt(a.v[r]) / c.root_correction + c.eps;
    rowmath::lean_elements(wide.w, wide.m, grad, a.d, c.lerp_weight, c.minus_step_size / root);
    if (s.norm == Norm::after_update) to_unit_norm(wide.w, a.d);
    const uint32_t key = key_of(a, r, s.step);
    store_weights(a, r, wide.w, key);
    store_moment(a, r, wide.m, key);
    a.last_step[r] = s.step;
}

}  // namespace

void detail::run_lean(Prepared<LeanJob>& prepared) {
    const rowmath::AdamConstants c = constants(prepared.job.step);
    prepared.run([&](int64_t i, float* grad) { update_row(prepared.job, c, i, grad); });
}

void catch_up(const LeanMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads) {
    for_shares(equal_shares(n, nullptr, n_threads), [&](int64_t, int64_t begin, int64_t end) {
        std::vector<float> buffer(static_cast<size_t>(2 * matrix.d));
        const Wide wide{buffer.data(), buffer.data() + matrix.d};
        for (int64_t i = begin; i < end; ++i) {
            if (i + 1 < end) prefetch_state(matrix, row_at(rows, i + 1));
            catch_up_row(matrix, step, row_at(rows, i), wide);
        }
    });
}

void normalise_rows(const LeanMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads) {
    for_shares(equal_shares(n, nullptr, n_threads), [&](int64_t, int64_t begin, int64_t end) {
        std::vector<float> w(static_cast<size_t>(matrix.d));
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = row_at(rows, i);
            rowmath::from_bf16(w.data(), matrix.w + r * matrix.d, matrix.d);
            to_unit_norm(w.data(), matrix.d);
            store_weights(matrix, r, w.data(), key_of(matrix, r, step.step, kNormalised));
        }
    });
}

void gradient_squares(const LeanJob& job, int n_threads) {
    const int64_t d = job.matrix.d;
    Prepared<LeanJob>(job, n_threads).run([&](int64_t i, float* grad) {
        rowmath::from_bf16(grad + d, job.matrix.w + row_at(job.rows, i) * d, d);
        add_along(job.gradient, i, grad + d, d, grad);
        if (job.step.project) project_out(grad, grad + d, d);
        job.squares[i] = rowmath::dot(grad, grad, d);
    });
}

}  // namespace saefast
