// Tensors as Python hands them over, and the only way from one to an address: kind, size, layout and device are checked
// first, so that a wrong tensor raises TypeError or ValueError instead of being written past its end.
// Python's side of the bindings: nothing but bindings*.cpp includes this. It asks a tensor for its attributes, so the build
// needs no torch. Everything here needs the GIL.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include "floats.hpp"

namespace saefast::tensors {

namespace py = pybind11;

// torch's name for the elements that C++ knows as T. bf16 has no type of its own here.
template <class T>
constexpr const char* kDtype = nullptr;
template <>
inline constexpr const char* kDtype<float> = "float32";
template <>
inline constexpr const char* kDtype<double> = "float64";
template <>
inline constexpr const char* kDtype<uint16_t> = "bfloat16";
template <>
inline constexpr const char* kDtype<uint8_t> = "uint8";
template <>
inline constexpr const char* kDtype<int8_t> = "int8";
template <>
inline constexpr const char* kDtype<bool> = "bool";
template <>
inline constexpr const char* kDtype<int32_t> = "int32";
template <>
inline constexpr const char* kDtype<int64_t> = "int64";

inline py::object torch_attribute(const char* name) { return py::module_::import("torch").attr(name); }

template <class T>
py::handle dtype_of() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> store;
    return store.call_once_and_store_result([] { return torch_attribute(kDtype<T>); }).get_stored();
}

// The product of sizes, refused where one is negative or it does not fit.
inline int64_t product(std::initializer_list<int64_t> sizes) {
    int64_t out = 1;
    for (int64_t size : sizes)
        if (size < 0 || __builtin_mul_overflow(out, size, &out)) throw py::value_error("a size is negative or too large");
    return out;
}

// An attribute, and what a method without arguments returns. A step asks a few hundred times, hence not py::attr, which
// makes a string of the name and a method of the tensor each time.
inline py::object get(py::handle tensor, PyObject* name) {
    PyObject* found = PyObject_GetAttr(tensor.ptr(), name);
    if (found == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

inline py::object call(py::handle tensor, PyObject* name) {
    PyObject* found = PyObject_CallMethodNoArgs(tensor.ptr(), name);
    if (found == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

#define SAEFAST_NAME(text) ([] { static PyObject* name = PyUnicode_InternFromString(text); return name; }())

inline py::object dtype(py::handle tensor) { return get(tensor, SAEFAST_NAME("dtype")); }

inline int64_t numel(py::handle tensor) { return py::cast<int64_t>(call(tensor, SAEFAST_NAME("numel"))); }

// Size `dim` of a tensor that has to have `dims` dimensions.
inline int64_t size(const char* name, py::handle tensor, int dim, int dims) {
    const auto shape = py::reinterpret_borrow<py::tuple>(get(tensor, SAEFAST_NAME("shape")));
    if (static_cast<int>(shape.size()) != dims)
        throw py::value_error(std::string(name) + " has " + std::to_string(shape.size()) + " dimensions: expected " +
                              std::to_string(dims));
    return py::cast<int64_t>(shape[static_cast<size_t>(dim)]);
}

inline int64_t length(const char* name, py::handle vector) { return size(name, vector, 0, 1); }

inline py::type_error unlike(const char* name, py::handle tensor, const std::string& expected) {
    return py::type_error(std::string(name) + " is " + std::string(py::str(tensor.attr("dtype"))) + " on " +
                          std::string(py::str(tensor.attr("device"))) + ": expected " + expected);
}

enum class Place { cpu, cuda };

inline std::uintptr_t address(const char* name, py::handle tensor, Place place) {
    const bool gpu = place == Place::cuda;
    if (get(tensor, gpu ? SAEFAST_NAME("is_cuda") : SAEFAST_NAME("is_cpu")).ptr() != Py_True)
        throw unlike(name, tensor, gpu ? "cuda" : "cpu");
    if (call(tensor, SAEFAST_NAME("is_contiguous")).ptr() != Py_True)
        throw py::value_error(std::string(name) + " is not contiguous: pass it as .contiguous()");
    return py::cast<std::uintptr_t>(call(tensor, SAEFAST_NAME("data_ptr")));
}

inline void check_count(const char* name, const char* of, int64_t found, int64_t expected, bool or_more) {
    if (or_more ? found >= expected : found == expected) return;
    throw py::value_error(std::string(name) + " holds " + std::to_string(found) + " " + of + ": expected " +
                          std::to_string(expected) + (or_more ? " or more" : ""));
}

// The address of a contiguous CPU tensor of exactly n elements of type T (or_more: at least n).
template <class T>
T* at(const char* name, py::handle tensor, int64_t n, bool or_more = false) {
    const std::uintptr_t found = address(name, tensor, Place::cpu);
    if (!dtype(tensor).is(dtype_of<T>())) throw unlike(name, tensor, kDtype<T>);
    check_count(name, "elements", numel(tensor), n, or_more);
    return reinterpret_cast<T*>(found);
}

// The same, or null for None.
template <class T>
T* maybe(const char* name, py::handle tensor, int64_t n) {
    return tensor.is_none() ? nullptr : at<T>(name, tensor, n);
}

inline int64_t bytes(py::handle tensor) {
    return product({numel(tensor), py::cast<int64_t>(call(tensor, SAEFAST_NAME("element_size")))});
}

// The address of a contiguous tensor of exactly n bytes, of any type.
inline char* raw(const char* name, py::handle tensor, int64_t n, Place place = Place::cpu) {
    const std::uintptr_t found = address(name, tensor, place);
    check_count(name, "bytes", bytes(tensor), n, false);
    return reinterpret_cast<char*>(found);
}

// Which of the three float formats a tensor is in.
inline Float float_type(const char* name, py::handle tensor) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> half;
    const py::object found = dtype(tensor);
    if (found.is(dtype_of<float>())) return Float::fp32;
    if (found.is(dtype_of<uint16_t>())) return Float::bf16;
    if (found.is(half.call_once_and_store_result([] { return torch_attribute("float16"); }).get_stored()))
        return Float::fp16;
    throw unlike(name, tensor, "float32, bfloat16 or float16");
}

// The address of n values of that format.
inline const void* floats(const char* name, py::handle tensor, Float type, int64_t n) {
    if (float_type(name, tensor) != type) throw unlike(name, tensor, "the dtype of what it goes with");
    return raw(name, tensor, product({n, bytes_of(type)}));
}

// n values of any of the three, asked for once.
struct Floats {
    Float type;
    const void* at;

    Floats(const char* name, py::handle tensor, int64_t n)
        : type(float_type(name, tensor)), at(raw(name, tensor, product({n, bytes_of(type)}))) {}
};

// Throws std::out_of_range for the first of n numbers outside [0, limit). Null is nothing to look at.
template <class T>
void check_inside(const char* name, const T* numbers, int64_t n, int64_t limit) {
    for (int64_t i = 0; numbers != nullptr && i < n; ++i)
        if (numbers[i] < 0 || numbers[i] >= limit)
            throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(numbers[i]) +
                                    ", outside [0, " + std::to_string(limit) + ")");
}

// Throws std::invalid_argument unless n offsets start at 0 or more, never descend and end within `limit`.
inline void check_offsets(const char* name, const int32_t* offsets, int64_t n, int64_t limit) {
    for (int64_t i = 0, before = 0; i < n; before = offsets[i++])
        if (offsets[i] < before || offsets[i] > limit)
            throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " +
                                        std::to_string(offsets[i]) + ": expected ascending offsets up to " +
                                        std::to_string(limit));
}

}  // namespace saefast::tensors
