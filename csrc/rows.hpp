// The training step on the entries that fired: a code's entries in groups, decode with loss, and row-wise Adam on the
// CPU.
//
// A group is one latent's entries in a batch. A weight's gradient row is the weighted sum of source rows over its group;
// it lives in a thread's buffer and is used up there, so no gradient tensor exists. Every sum has a fixed order that does
// not depend on the number of threads. No torch, no Python. All matrices are fp32, row-major and contiguous.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace saefast {

// Groups n entries by latent, stably: `order` lists entry numbers latent by latent, `latents` the latents that have
// any, ascending, and offsets[r] .. offsets[r + 1] is group r's part of `order`. Entries with keep[i] == 0 are left out
// (keep may be null). order and latents hold n, offsets n + 1. Returns the number of groups.
// Throws std::out_of_range naming the first idx outside [0, n_latents).
int64_t group_entries(const int32_t* idx, const uint8_t* keep, int64_t n, int64_t n_latents, int32_t* order,
                   int32_t* latents, int32_t* offsets);

// A sparse code's entries: K in each of B rows, or as many as row_ptr says.
struct CodeEntries {
    const float* acts = nullptr;
    const int32_t* idx = nullptr;
    const int32_t* row_ptr = nullptr;  // (B + 1) from 0 on; entries from row_ptr[B] on belong to no row. Or null
    int64_t n = 0;                     // entries, those of no row included
    int64_t B = 0, K = 0;

    int64_t begin(int64_t b) const { return row_ptr == nullptr ? b * K : row_ptr[b]; }
    int64_t row_of(int64_t entry) const;  // the last row for an entry of none
};

// An entry belongs to the first prefix p with key < bounds[p]; its key is its place in its row or, by_latent, its
// latent. P prefixes.
struct Prefixes {
    const int32_t* bounds = nullptr;  // (P) ascending
    int64_t P = 1;
    bool by_latent = false;

    // P for none.
    int64_t of(int64_t place, int32_t latent) const {
        return std::upper_bound(bounds, bounds + P, by_latent ? int64_t{latent} : place) - bounds;
    }
};

// A part of the entries that a step updates by, and their gradient.
struct EntryPart {
    CodeEntries code;
    const float* grad = nullptr;  // dloss / dacts
};

// Grouped entries of some parts, numbered one part after the other.
struct Groups {
    const int32_t *order = nullptr, *latents = nullptr, *offsets = nullptr;
    int64_t n = 0;
};

// For each grouped entry: its rows in the residual planes (each of B rows) and in the encoder's input, and its weights
// there (-2 · act, as residuals are minus half the gradient, and grad). An entry of part 0 has the plane of its prefix,
// and the weight 0 if it has none; one of part i > 0 has plane P - 1 + i. grad_by_latent (n_latents) gets Σ grad of
// each group, 0 elsewhere.
struct Entries {
    int32_t* dec_row = nullptr;
    float* dec_coef = nullptr;
    int32_t* enc_row = nullptr;
    float* enc_coef = nullptr;
    float* grad_by_latent = nullptr;
    int64_t n_latents = 0;
};
void fill_entries(const std::vector<EntryPart>& parts, const Prefixes& prefixes, const Groups& groups,
                  const Entries& out);

// Where gradient rows come from: row r is Σ coef[e] · source[row[e]] over e in offsets[r] .. offsets[r + 1]. A null
// `offsets` means that all of them are zero. Groups longer than kPiece entries are summed piece by piece and the pieces
// added in order, so that one latent which fires everywhere keeps no thread waiting.
// Where `along` is not null, along[r, m] times block m of the row's own weights is added, each block of d / blocks
// columns: weights as the forward pass read them, settled and not yet scaled to unit norm by Norm::before_update.
struct RowGradient {
    const float* source = nullptr;
    const int32_t* offsets = nullptr;
    const int32_t* row = nullptr;
    const float* coef = nullptr;
    const float* along = nullptr;  // (rows, blocks) or null
    int64_t blocks = 1;
};

// A weight matrix (n_rows, d) with Adam's state. last_step[r] is the step that row r's state stands at.
struct AdamMatrix {
    float* w = nullptr;
    float* m = nullptr;
    float* v = nullptr;
    int32_t* last_step = nullptr;
    uint16_t* shadow = nullptr;  // bf16 copy of w, or null
    float* norms = nullptr;      // (n_rows) norms of the rows, or null
    int64_t n_rows = 0;
    int64_t d = 0;
};

// When a row is scaled to unit norm.
enum class Norm : int { never = 0, before_update = 1, after_update = 2 };

// One step's constants. `drift` and `drift_eps` say how far a row that had no gradient since step s has to move on
// (saefast.optim.state.DriftTable): w -= drift[s] · m / (√v + drift_eps[s]).
struct AdamStep {
    int32_t step = 0;  // counts from 1
    double beta1 = 0.9, beta2 = 0.999;
    double lr = 0, eps = 0;
    const double* drift = nullptr;
    const double* drift_eps = nullptr;
    float grad_scale = 1;  // clipping
    bool project = false;  // take the gradient's part along the row out
    Norm norm = Norm::never;
};

// Brings rows[0 .. n) (null: rows 0 .. n) to `step.step` as if their gradient had been 0 since last_step: moments in
// closed form, weights by the drift they missed. Rows that are there already stay as they are, bit for bit. With
// Norm::before_update such a row is scaled to unit norm before its drift; with after_update, after.
void catch_up(const AdamMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads);

// Scales rows[0 .. n) (null: all) to unit norm. `step` says when, which only stochastic rounding asks.
void normalise_rows(const AdamMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads);

// One Adam step (Kingma & Ba 2015; torch's order of operations) for rows[0 .. n) of a matrix (null: rows 0 .. n), each
// caught up to step - 1 first. Writes Σ grad² of each row, after projection and before scaling, to `squares` (n) if not
// null. A vector (a bias) is a matrix of one row.
struct AdamJob {
    static constexpr int64_t kBuffers = 1;
    AdamMatrix matrix;
    AdamStep step;
    RowGradient gradient;
    const int32_t* rows = nullptr;
    int64_t n = 0;
    float* squares = nullptr;
};

// A weight matrix in lean form: bf16 weights, an 8-bit first moment in blocks that never cross rows, one second moment
// a row. Weights and first moments are rounded stochastically, with bits that seed, step, row and column decide.
struct LeanMatrix {
    uint16_t* w = nullptr;      // bf16
    int8_t* m = nullptr;        // times its block's scale
    uint16_t* scale = nullptr;  // (n_rows, blocks) bf16
    float* v = nullptr;         // (n_rows)
    int32_t* last_step = nullptr;
    float* norms = nullptr;     // (n_rows) or null
    int64_t n_rows = 0;
    int64_t d = 0;
    int64_t blocks = 1;         // each of ⌈d / blocks⌉ columns
    uint32_t seed = 0;
};

struct LeanJob {
    static constexpr int64_t kBuffers = 3;
    LeanMatrix matrix;
    AdamStep step;
    RowGradient gradient;
    const int32_t* rows = nullptr;
    int64_t n = 0;
    float* squares = nullptr;
};

void catch_up(const LeanMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads);
void normalise_rows(const LeanMatrix& matrix, const AdamStep& step, const int32_t* rows, int64_t n, int n_threads);
void gradient_squares(const LeanJob& job, int n_threads);

// Does all jobs, one after the other. All memory is allocated before the first row is written, so that running
// out of it leaves every matrix as it was.
void update_rows(const std::vector<AdamJob>& jobs, const std::vector<LeanJob>& lean_jobs, int n_threads);

// The `squares` that update_rows would report, nothing else written: the first pass of clipping by the global norm.
void gradient_squares(const AdamJob& job, int n_threads);

// Decode, residual, loss sums and the gradient to the activations, each decoder row read once from memory. Prefix p
// decodes the entries of prefixes 0 .. p.
struct DecodeLoss {
    const float* x = nullptr;        // (B, d)
    CodeEntries code;
    const void* W_dec = nullptr;     // (L, d) fp32, or bf16 where `bf16` says so
    bool bf16 = false;
    const float* b_dec = nullptr;    // (d) or null
    Prefixes prefixes;
    const float* weight = nullptr;   // (P) dloss / dΣe² of each prefix
    int64_t main = 0;                // the prefix whose e is written to `error`
    int64_t d = 0, n_latents = 0;
    float* residual = nullptr;   // (P, B, d) -> Σ over p' >= p of weight[p'] · e[p'], e = x - x_hat
    float* squares = nullptr;    // (P, B) -> Σ e² of each row
    float* grad_acts = nullptr;  // (n) -> dloss / dacts; 0 for entries of no row
    float* error = nullptr;      // (B, d) -> e, or null
    bool relu = true;            // acts went through ReLU: where they are not positive, grad_acts is 0
};
void decode_loss(const DecodeLoss& args, int n_threads);

// out[d] = Σ coef[i] · W[rows[i]] (null rows: i; null coef: 1), in blocks of fixed size added in order. W is fp32, or
// bf16 where `bf16` says so.
void weighted_row_sum(const void* W, bool bf16, int64_t d, const int32_t* rows, const float* coef, int64_t n, float* out,
                      int n_threads);

// Σ over all elements of (x - column mean)², and of x², in double. x (n, d).
void batch_sums(const float* x, int64_t n, int64_t d, double* variance, double* squares, int n_threads);

}  // namespace saefast
