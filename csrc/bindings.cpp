// The Python face of csrc/: the only file that includes pybind11. Tensors arrive as integer addresses and sizes; the
// Python wrappers in saefast/native.py have checked dtype, shape and contiguity. One bind_ function per source file.
// C++ exceptions become Python's: out_of_range IndexError, invalid_argument ValueError, runtime_error RuntimeError.

#include <cstdint>
#include <stdexcept>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gather.hpp"

namespace py = pybind11;
using namespace py::literals;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_gather(py::module_& m) {
    m.def(
        "gather_rows",
        [](Address src, int64_t n_rows, int64_t row_bytes, Address index, int64_t n_index, Address dst, int n_threads) {
            py::gil_scoped_release release;
            saefast::gather_rows(at<const void>(src), n_rows, row_bytes, at<const int64_t>(index), n_index,
                                 at<void>(dst), n_threads);
        },
        "src"_a, "n_rows"_a, "row_bytes"_a, "index"_a, "n_index"_a, "dst"_a, "n_threads"_a);
    m.def(
        "gather_rows_from",
        [](const std::vector<Address>& sources, const std::vector<int64_t>& first_row, int64_t row_bytes, Address index,
           int64_t n_index, Address dst, int n_threads) {
            if (first_row.size() != sources.size() + 1)
                throw std::invalid_argument("first_row needs one entry more than there are sources");
            py::gil_scoped_release release;
            saefast::gather_rows_from(reinterpret_cast<const void* const*>(sources.data()), first_row.data(),
                                      static_cast<int64_t>(sources.size()), row_bytes, at<const int64_t>(index),
                                      n_index, at<void>(dst), n_threads);
        },
        "sources"_a, "first_row"_a, "row_bytes"_a, "index"_a, "n_index"_a, "dst"_a, "n_threads"_a);
#ifdef SAEFAST_CUDA
    m.def(
        "gather_rows_cuda",
        [](Address src, int64_t n_rows, int64_t row_bytes, Address index, int64_t n_index, Address dst,
           Address first_bad, Address stream) {
            const int error = saefast::gather_rows_cuda(at<const void>(src), n_rows, row_bytes,
                                                        at<const int64_t>(index), n_index, at<void>(dst),
                                                        at<int64_t>(first_bad), stream);
            if (error != 0) throw std::runtime_error(saefast::cuda_error_text(error));
        },
        "src"_a, "n_rows"_a, "row_bytes"_a, "index"_a, "n_index"_a, "dst"_a, "first_bad"_a, "stream"_a);
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "saefast's C++ half; used through saefast.native";
#ifdef SAEFAST_CUDA
    m.attr("HAS_CUDA") = true;
#else
    m.attr("HAS_CUDA") = false;
#endif
    bind_gather(m);
}
