// Row-wise Adam in fp32: a gradient row is summed in a buffer, used up by the update, and never stored.

#include "rows_detail.hpp"

namespace saefast {

namespace {

using namespace detail;

// Settles row r, which had no gradient in the steps last_step + 1 .. until.
void settle_row(const AdamMatrix& a, const AdamStep& s, int64_t r, int32_t until) {
    const int32_t since = a.last_step[r];
    if (since >= until) return;
    float *w = a.w + r * a.d, *m = a.m + r * a.d, *v = a.v + r * a.d;
    if (s.norm == Norm::before_update) to_unit_norm(w, a.d);
    rowmath::drift_elements(w, m, v, a.d, static_cast<float>(s.drift[since]), static_cast<float>(s.drift_eps[since]),
                            static_cast<float>(std::pow(s.beta1, until - since)),
                            static_cast<float>(std::pow(s.beta2, until - since)));
    if (s.norm == Norm::after_update) to_unit_norm(w, a.d);
    a.last_step[r] = until;
}

void write_copies(const AdamMatrix& a, int64_t r) {
    const float* w = a.w + r * a.d;
    if (a.shadow != nullptr) rowmath::to_bf16(a.shadow + r * a.d, w, a.d);
    if (a.norms != nullptr) a.norms[r] = std::sqrt(rowmath::dot(w, w, a.d));
}

// Row i of a job.
void update_row(const AdamJob& job, const rowmath::AdamConstants& c, int64_t i, float* grad) {
    const AdamMatrix& a = job.matrix;
    const AdamStep& s = job.step;
    const int64_t r = row_at(job.rows, i);
    float* w = a.w + r * a.d;
    settle_row(a, s, r, s.step - 1);
    add_along(job.gradient, i, w, a.d, grad);
    if (s.norm == Norm::before_update) to_unit_norm(w, a.d);
    if (s.project) project_out(grad, w, a.d);
    if (job.squares != nullptr) job.squares[i] = rowmath::dot(grad, grad, a.d);
    if (s.grad_scale != 1.0f) rowmath::scale(grad, s.grad_scale, a.d);
    rowmath::adam_elements(w, a.m + r * a.d, a.v + r * a.d, grad, a.d, c);
    if (s.norm == Norm::after_update) to_unit_norm(w, a.d);
    write_copies(a, r);
    a.last_step[r] = s.step;
}

void run_adam(Prepared<AdamJob>& prepared) {
    const rowmath::AdamConstants c = constants(prepared.job.step);
    prepared.run([&](int64_t i, float* grad) { update_row(prepared.job, c, i, grad); });
}

}  // namespace

void catch_up(const AdamMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads) {
    for_shares(equal_shares(n, nullptr, n_threads), [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = row_at(rows, i);
            if (i + 1 < end) prefetch_state(matrix, row_at(rows, i + 1));
            if (matrix.last_step[r] >= step.step) continue;
            settle_row(matrix, step, r, step.step);
            write_copies(matrix, r);
        }
    });
}

void normalise_rows(const AdamMatrix& matrix, const AdamStep&, const int32_t* rows, int64_t n, int n_threads) {
    for_shares(equal_shares(n, nullptr, n_threads), [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            to_unit_norm(matrix.w + row_at(rows, i) * matrix.d, matrix.d);
            write_copies(matrix, row_at(rows, i));
        }
    });
}

void update_rows(const std::vector<AdamJob>& jobs, const std::vector<LeanJob>& lean_jobs, int n_threads) {
    std::vector<Prepared<AdamJob>> prepared;
    std::vector<Prepared<LeanJob>> lean;
    prepared.reserve(jobs.size());
    lean.reserve(lean_jobs.size());
    for (const AdamJob& job : jobs) prepared.emplace_back(job, n_threads);
    for (const LeanJob& job : lean_jobs) lean.emplace_back(job, n_threads);
    for (auto& p : prepared) run_adam(p);
    for (auto& p : lean) run_lean(p);
}

void gradient_squares(const AdamJob& job, int n_threads) {
    Prepared(job, n_threads).run([&](int64_t i, float* grad) {
        const int64_t d = job.matrix.d;
        const float* w = job.matrix.w + row_at(job.rows, i) * d;
        add_along(job.gradient, i, w, d, grad);
        if (job.step.project) project_out(grad, w, d);
        job.squares[i] = rowmath::dot(grad, grad, d);
    });
}

}  // namespace saefast
