// The Python face of the row operations (rows.hpp). See bindings.cpp.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rows.hpp"
#include "tensors.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

using py::handle;
using namespace saefast::tensors;

// Gradient rows with their number and width.
struct Gradient : saefast::RowGradient {
    int64_t n_rows = 0, d = 0;
};

Gradient make_gradient(handle source, handle offsets, handle row, handle coef, handle along) {
    Gradient g;
    const int64_t n_source = size("source", source, 0, 2), entries = length("row", row);
    g.n_rows = length("offsets", offsets) - 1;
    g.d = size("source", source, 1, 2);
    g.source = at<float>("source", source, product({n_source, g.d}));
    g.offsets = at<int32_t>("offsets", offsets, g.n_rows + 1);
    g.row = at<int32_t>("row", row, entries);
    g.coef = at<float>("coef", coef, entries);
    check_offsets("offsets", g.offsets, g.n_rows + 1, entries);
    check_inside("row", g.row, entries, n_source);
    if (along.is_none()) return g;
    g.blocks = size("along", along, 1, 2);
    g.along = at<float>("along", along, product({g.n_rows, g.blocks}));
    if (g.blocks < 1 || g.d % g.blocks != 0)
        throw py::value_error("along has " + std::to_string(g.blocks) + " columns: expected a divisor of " +
                              std::to_string(g.d));
    return g;
}

// Some rows of a matrix, or all of them for None. Each stands at a step that the drift tables have.
struct Rows {
    const int32_t* ids;
    int64_t n;

    template <class Matrix>
    Rows(const Matrix& matrix, handle rows)
        : n(rows.is_none() ? matrix.n_rows : length("rows", rows)) {
        ids = maybe<int32_t>("rows", rows, n);
        check_inside("rows", ids, n, matrix.n_rows);
        for (int64_t i = 0; i < n; ++i)
            check_inside("last_step", matrix.last_step + (ids == nullptr ? i : ids[i]), 1, INT32_MAX);
    }
};

// What exists for either kind of weight matrix.
template <class Matrix, class Job>
void bind_row_ops(py::module_& m) {
    using namespace saefast;
    py::class_<Job>(m, Job::kBuffers == 1 ? "AdamJob" : "LeanJob")
        .def(py::init([](const Matrix& matrix, const AdamStep& step, const Gradient& gradient, handle rows,
                         handle squares) {
                 const Rows chosen(matrix, rows);
                 if (gradient.d != matrix.d || gradient.n_rows != chosen.n)
                     throw py::value_error("the gradient has " + std::to_string(gradient.n_rows) + " rows of " +
                                           std::to_string(gradient.d) + ": expected " + std::to_string(chosen.n) +
                                           " of " + std::to_string(matrix.d));
                 return Job{matrix, step, gradient, chosen.ids, chosen.n, at<float>("squares", squares, chosen.n)};
             }),
             "matrix"_a, "step"_a, "gradient"_a, "rows"_a, "squares"_a);
    m.def(
        "catch_up",
        [](const Matrix& matrix, const AdamStep& step, handle rows, int n_threads) {
            const Rows chosen(matrix, rows);
            py::gil_scoped_release release;
            catch_up(matrix, step, chosen.ids, chosen.n, n_threads);
        },
        "matrix"_a, "step"_a, "rows"_a, "n_threads"_a);
    m.def(
        "normalise_rows",
        [](const Matrix& matrix, const AdamStep& step, handle rows, int n_threads) {
            const Rows chosen(matrix, rows);
            py::gil_scoped_release release;
            normalise_rows(matrix, step, chosen.ids, chosen.n, n_threads);
        },
        "matrix"_a, "step"_a, "rows"_a, "n_threads"_a);
    m.def("gradient_squares", py::overload_cast<const Job&, int>(&gradient_squares), "job"_a, "n_threads"_a,
          py::call_guard<py::gil_scoped_release>());
}

void bind_matrices(py::module_& m) {
    using namespace saefast;
    py::class_<AdamMatrix>(m, "AdamMatrix")
        .def(py::init([](handle w, handle m, handle v, handle last_step, handle shadow, handle norms) {
                 const int64_t n = size("w", w, 0, 2), d = size("w", w, 1, 2), all = product({n, d});
                 return AdamMatrix{at<float>("w", w, all),
                                   at<float>("m", m, all),
                                   at<float>("v", v, all),
                                   at<int32_t>("last_step", last_step, n),
                                   maybe<uint16_t>("shadow", shadow, all),
                                   maybe<float>("norms", norms, n),
                                   n,
                                   d};
             }),
             "w"_a, "m"_a, "v"_a, "last_step"_a, "shadow"_a, "norms"_a);
    py::class_<LeanMatrix>(m, "LeanMatrix")
        .def(py::init([](handle w, handle m, handle scale, handle v, handle last_step, handle norms, uint32_t seed) {
                 const int64_t n = size("w", w, 0, 2), d = size("w", w, 1, 2), all = product({n, d});
                 const int64_t blocks = size("scale", scale, 1, 2);
                 if (d > 0 && blocks < 1) throw py::value_error("scale has no columns: expected one a block");
                 return LeanMatrix{at<uint16_t>("w", w, all),
                                   at<int8_t>("m", m, all),
                                   at<uint16_t>("scale", scale, product({n, blocks})),
                                   at<float>("v", v, n),
                                   at<int32_t>("last_step", last_step, n),
                                   maybe<float>("norms", norms, n),
                                   n,
                                   d,
                                   blocks,
                                   seed};
             }),
             "w"_a, "m"_a, "scale"_a, "v"_a, "last_step"_a, "norms"_a, "seed"_a);
    py::class_<AdamStep>(m, "AdamStep")
        .def(py::init([](int32_t step, double beta1, double beta2, double lr, double eps, handle drift,
                         handle drift_eps, float grad_scale, bool project, int norm) {
                 // A row that stands at step s < step drifts by entry s.
                 return AdamStep{step,
                                 beta1,
                                 beta2,
                                 lr,
                                 eps,
                                 at<double>("drift", drift, step, true),
                                 at<double>("drift_eps", drift_eps, step, true),
                                 grad_scale,
                                 project,
                                 static_cast<Norm>(norm)};
             }),
             "step"_a, "beta1"_a, "beta2"_a, "lr"_a, "eps"_a, "drift"_a, "drift_eps"_a, "grad_scale"_a, "project"_a,
             "norm"_a);
    py::class_<Gradient>(m, "RowGradient")
        .def(py::init(&make_gradient), "source"_a, "offsets"_a, "row"_a, "coef"_a, "along"_a);
}

saefast::CodeEntries make_code(handle acts, handle idx, handle row_ptr) {
    saefast::CodeEntries code;
    if (row_ptr.is_none()) {
        code.B = size("idx", idx, 0, 2), code.K = size("idx", idx, 1, 2);
        code.n = product({code.B, code.K});
    } else {
        code.n = length("idx", idx), code.B = length("row_ptr", row_ptr) - 1;
        code.row_ptr = at<int32_t>("row_ptr", row_ptr, code.B + 1);
        check_offsets("row_ptr", code.row_ptr, code.B + 1, code.n);
        if (code.B < 0 || code.row_ptr[0] != 0 || (code.B == 0 && code.n > 0))
            throw py::value_error("row_ptr does not begin at 0, or has no row for the entries");
    }
    code.acts = at<float>("acts", acts, code.n);
    code.idx = at<int32_t>("idx", idx, code.n);
    return code;
}

void bind_code(py::module_& m) {
    using namespace saefast;
    m.def(
        "group_entries",
        [](handle idx, handle keep, int64_t n_latents, handle order, handle latents, handle offsets) {
            const int64_t n = length("idx", idx);
            const auto* entries = at<int32_t>("idx", idx, n);
            const auto* kept = reinterpret_cast<const uint8_t*>(at<bool>("keep", keep, n));
            auto *to_order = at<int32_t>("order", order, n), *to_latents = at<int32_t>("latents", latents, n);
            auto* to_offsets = at<int32_t>("offsets", offsets, n + 1);
            py::gil_scoped_release release;
            return group_entries(entries, kept, n, n_latents, to_order, to_latents, to_offsets);
        },
        "idx"_a, "keep"_a, "n_latents"_a, "order"_a, "latents"_a, "offsets"_a);
    py::class_<EntryPart>(m, "EntryPart")
        .def(py::init([](handle acts, handle idx, handle row_ptr, handle grad) {
                 const CodeEntries code = make_code(acts, idx, row_ptr);
                 return EntryPart{code, at<float>("grad", grad, code.n)};
             }),
             "acts"_a, "idx"_a, "row_ptr"_a, "grad"_a);
    m.def(
        "fill_entries",
        [](const std::vector<EntryPart>& parts, const std::vector<int32_t>& bounds, bool by_latent, int64_t n_latents,
           handle order, handle latents, handle offsets, handle dec_row, handle dec_coef, handle enc_row,
           handle enc_coef, handle grad_by_latent) {
            int64_t all = 0;
            for (const EntryPart& part : parts) {
                check_count("a part's code", "rows", part.code.B, parts[0].code.B, false);
                all += part.code.n;
            }
            const int64_t n = length("order", order), n_groups = length("latents", latents);
            const Groups groups{at<int32_t>("order", order, n), at<int32_t>("latents", latents, n_groups),
                                at<int32_t>("offsets", offsets, n_groups + 1), n_groups};
            check_inside("order", groups.order, n, all);
            check_inside("latents", groups.latents, n_groups, n_latents);
            check_offsets("offsets", groups.offsets, n_groups + 1, n);
            const Prefixes prefixes{bounds.data(), static_cast<int64_t>(bounds.size()), by_latent};
            const Entries out{at<int32_t>("dec_row", dec_row, n),
                              at<float>("dec_coef", dec_coef, n),
                              at<int32_t>("enc_row", enc_row, n),
                              at<float>("enc_coef", enc_coef, n),
                              at<float>("grad_by_latent", grad_by_latent, n_latents),
                              n_latents};
            py::gil_scoped_release release;
            fill_entries(parts, prefixes, groups, out);
        },
        "parts"_a, "bounds"_a, "by_latent"_a, "n_latents"_a, "order"_a, "latents"_a, "offsets"_a, "dec_row"_a,
        "dec_coef"_a, "enc_row"_a, "enc_coef"_a, "grad_by_latent"_a);
}

// fp32 or bf16: what the row operations read a weight matrix in.
bool is_bf16(const char* name, handle W) {
    const saefast::Float type = float_type(name, W);
    if (type == saefast::Float::fp16) throw unlike(name, W, "float32 or bfloat16");
    return type == saefast::Float::bf16;
}

saefast::DecodeLoss make_decode_loss(handle x, handle acts, handle idx, handle row_ptr, handle W_dec, handle b_dec,
                                     handle bounds, handle weight, bool by_latent, int64_t main, handle residual,
                                     handle squares, handle grad_acts, handle error, bool relu) {
    saefast::DecodeLoss a;
    a.code = make_code(acts, idx, row_ptr);
    a.d = size("W_dec", W_dec, 1, 2), a.n_latents = size("W_dec", W_dec, 0, 2);
    a.bf16 = is_bf16("W_dec", W_dec), a.main = main, a.relu = relu;
    const int64_t P = length("weight", weight), rows = product({a.code.B, a.d});
    a.x = at<float>("x", x, rows);
    a.W_dec = floats("W_dec", W_dec, a.bf16 ? saefast::Float::bf16 : saefast::Float::fp32,
                     product({a.n_latents, a.d}));
    a.b_dec = maybe<float>("b_dec", b_dec, a.d);
    a.prefixes = {at<int32_t>("bounds", bounds, P), P, by_latent};
    a.weight = at<float>("weight", weight, P);
    a.residual = at<float>("residual", residual, product({P, rows}));
    a.squares = at<float>("squares", squares, product({P, a.code.B}));
    a.grad_acts = at<float>("grad_acts", grad_acts, a.code.n);
    a.error = maybe<float>("error", error, rows);
    return a;
}

void bind_rows(py::module_& m) {
    using namespace saefast;
    bind_row_ops<AdamMatrix, AdamJob>(m);
    bind_row_ops<LeanMatrix, LeanJob>(m);
    m.def("update_rows", &update_rows, "jobs"_a, "lean_jobs"_a, "n_threads"_a,
          py::call_guard<py::gil_scoped_release>());
    py::class_<DecodeLoss>(m, "DecodeLoss")
        .def(py::init(&make_decode_loss), "x"_a, "acts"_a, "idx"_a, "row_ptr"_a, "W_dec"_a, "b_dec"_a, "bounds"_a,
             "weight"_a, "by_latent"_a, "main"_a, "residual"_a, "squares"_a, "grad_acts"_a, "error"_a, "relu"_a);
    m.def("decode_loss", &decode_loss, "args"_a, "n_threads"_a, py::call_guard<py::gil_scoped_release>());
    m.def(
        "weighted_row_sum",
        [](handle W, handle rows, handle coef, handle out, int n_threads) {
            const int64_t n_rows = size("W", W, 0, 2), d = size("W", W, 1, 2);
            const int64_t n = rows.is_none() ? n_rows : length("rows", rows);
            const bool bf16 = is_bf16("W", W);
            const void* from = floats("W", W, bf16 ? Float::bf16 : Float::fp32, product({n_rows, d}));
            const auto* ids = maybe<int32_t>("rows", rows, n);
            check_inside("rows", ids, n, n_rows);
            const auto* weights = maybe<float>("coef", coef, n);
            auto* to = at<float>("out", out, d);
            py::gil_scoped_release release;
            weighted_row_sum(from, bf16, d, ids, weights, n, to, n_threads);
        },
        "W"_a, "rows"_a, "coef"_a, "out"_a, "n_threads"_a);
    m.def(
        "batch_sums",
        [](handle x, int n_threads) {
            const int64_t n = size("x", x, 0, 2), d = size("x", x, 1, 2);
            const auto* from = at<float>("x", x, product({n, d}));
            py::gil_scoped_release release;
            double variance = 0, squares = 0;
            batch_sums(from, n, d, &variance, &squares, n_threads);
            return std::pair<double, double>(variance, squares);
        },
        "x"_a, "n_threads"_a);
}

}  // namespace

void bind_row_operations(py::module_& m) {
    bind_matrices(m);
    bind_code(m);
    bind_rows(m);
}
