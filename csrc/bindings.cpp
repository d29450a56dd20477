// The Python face of csrc/: the only file that includes pybind11. Tensors arrive as integer addresses and sizes; the
// Python wrappers in saefast/native.py have checked dtype, shape and contiguity. One section per source file.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "saefast's C++ half; used through saefast.native";
#ifdef SAEFAST_CUDA
    m.attr("HAS_CUDA") = true;
#else
    m.attr("HAS_CUDA") = false;
#endif
}
