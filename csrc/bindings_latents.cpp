// The Python face of what is counted over latents (cofiring.hpp). See bindings.cpp.

#include <cstdint>

#include <pybind11/pybind11.h>

#include "cofiring.hpp"
#include "tensors.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

using py::handle;
using namespace saefast::tensors;

void bind_cofiring(py::module_& m) {
    m.def(
        "cofiring",
        [](handle row_ptr, handle idx, int64_t n_latents, int64_t first, handle ptr, handle row, handle n_fired,
           handle worth, handle least, handle ids, handle counts, int n_threads) {
            using namespace saefast;
            const int64_t n_rows = length("row_ptr", row_ptr) - 1, n = length("ptr", ptr) - 1;
            const int64_t best = size("ids", ids, 1, 2), longest = length("worth", worth) - 1;
            if (n_rows < 0 || n < 0) throw py::value_error("row_ptr or ptr is empty: expected a 0 at least");
            const auto* rows = at<int64_t>("row_ptr", row_ptr, n_rows + 1);
            const auto* of_latents = at<int64_t>("ptr", ptr, n + 1);
            const CodeOfRows code{rows, at<int32_t>("idx", idx, rows[n_rows]), n_rows, n_latents};
            const RowsOfLatents latents{of_latents, at<int64_t>("row", row, of_latents[n]), first, n};
            const PairRank rank{at<int64_t>("n_fired", n_fired, n_latents), at<double>("worth", worth, longest + 1),
                                at<double>("least", least, n), longest};
            auto* to_ids = at<int32_t>("ids", ids, product({n, best}));
            auto* to_counts = at<int64_t>("counts", counts, product({n, best}));
            py::gil_scoped_release release;
            cofiring(code, latents, rank, best, to_ids, to_counts, n_threads);
        },
        "row_ptr"_a, "idx"_a, "n_latents"_a, "first"_a, "ptr"_a, "row"_a, "n_fired"_a, "worth"_a, "least"_a, "ids"_a,
        "counts"_a, "n_threads"_a);
}

}  // namespace

void bind_latents(py::module_& m) { bind_cofiring(m); }
