// The Python face of csrc/, with bindings_rows.cpp for the row operations and bindings_latents.cpp for what is counted
// over latents: pybind11 is included in these and in tensors.hpp alone. Tensors arrive as Python has them; tensors.hpp
// makes addresses of them once their dtype, size, layout and device are right, and sizes come from their shapes, so no
// number that Python passes can make memory look larger than it is. One bind_ function per source file.
// C++ exceptions become Python's: out_of_range IndexError, invalid_argument ValueError, runtime_error RuntimeError.

#include <cstdint>
#include <stdexcept>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "buffer.hpp"
#include "gather.hpp"
#include "group_max.hpp"
#include "mixed.hpp"
#include "select_kth.hpp"
#include "spmm.hpp"
#include "tensors.hpp"
#include "threshold.hpp"
#include "topk.hpp"

namespace py = pybind11;
using namespace py::literals;

void bind_row_operations(py::module_& m);  // bindings_rows.cpp
void bind_latents(py::module_& m);         // bindings_latents.cpp

namespace {

using py::handle;
using namespace saefast::tensors;

// Rows of a tensor of any shape, and the bytes of one.
struct RowShape {
    int64_t rows, row_bytes;
};

RowShape row_shape(const char* name, handle tensor) {
    const py::tuple shape = tensor.attr("shape");
    if (shape.empty()) throw py::value_error(std::string(name) + " is a number: expected rows");
    int64_t row_bytes = py::cast<int64_t>(tensor.attr("element_size")());
    for (size_t i = 1; i < shape.size(); ++i) row_bytes = product({row_bytes, py::cast<int64_t>(shape[i])});
    return {py::cast<int64_t>(shape[0]), row_bytes};
}

// Matrices that count as one, kept alive and looked at once: there may be thousands.
struct Sources {
    py::list kept;
    std::vector<const void*> addresses;
    std::vector<int64_t> first_row{0};
    int64_t row_bytes = 0;

    explicit Sources(const py::list& tensors) : kept(tensors) {
        for (handle tensor : tensors) {
            const RowShape shape = row_shape("sources", tensor);
            if (!addresses.empty() && shape.row_bytes != row_bytes)
                throw py::value_error("sources have rows of " + std::to_string(row_bytes) + " and of " +
                                      std::to_string(shape.row_bytes) + " bytes: expected one size");
            row_bytes = shape.row_bytes;
            addresses.push_back(raw("sources", tensor, product({shape.rows, row_bytes})));
            first_row.push_back(first_row.back() + shape.rows);
        }
    }
};

void bind_gather(py::module_& m) {
    m.def(
        "gather_rows",
        [](handle src, handle index, handle out, int n_threads) {
            const RowShape shape = row_shape("src", src);
            const int64_t n = length("index", index);
            const auto* from = raw("src", src, product({shape.rows, shape.row_bytes}));
            const auto* rows = at<int64_t>("index", index, n);
            auto* to = raw("out", out, product({n, shape.row_bytes}));
            py::gil_scoped_release release;
            saefast::gather_rows(from, shape.rows, shape.row_bytes, rows, n, to, n_threads);
        },
        "src"_a, "index"_a, "out"_a, "n_threads"_a);
    py::class_<Sources>(m, "Sources")
        .def(py::init<const py::list&>(), "tensors"_a)
        .def(
            "gather",
            [](const Sources& self, handle index, handle out, int n_threads) {
                const int64_t n = length("index", index);
                const auto* rows = at<int64_t>("index", index, n);
                auto* to = raw("out", out, product({n, self.row_bytes}));
                py::gil_scoped_release release;
                saefast::gather_rows_from(self.addresses.data(), self.first_row.data(),
                                          static_cast<int64_t>(self.addresses.size()), self.row_bytes, rows, n, to,
                                          n_threads);
            },
            "index"_a, "out"_a, "n_threads"_a);
#ifdef SAEFAST_CUDA
    m.def(
        "gather_rows_cuda",
        [](handle src, handle index, handle out, handle first_bad, std::uintptr_t stream) {
            const RowShape shape = row_shape("src", src);
            const int64_t n = length("index", index);
            const auto on_gpu = [](const char* name, handle tensor, int64_t bytes) {
                return static_cast<void*>(raw(name, tensor, bytes, Place::cuda));
            };
            const int error = saefast::gather_rows_cuda(
                on_gpu("src", src, product({shape.rows, shape.row_bytes})), shape.rows, shape.row_bytes,
                static_cast<const int64_t*>(on_gpu("index", index, product({n, 8}))), n,
                on_gpu("out", out, product({n, shape.row_bytes})),
                static_cast<int64_t*>(on_gpu("first_bad", first_bad, 8)), stream);
            if (error != 0) throw std::runtime_error(saefast::cuda_error_text(error));
        },
        "src"_a, "index"_a, "out"_a, "first_bad"_a, "stream"_a);
#endif
}

// A buffer with the source it reads. In a forked child it is left where it is: see Buffer::lives_here.
struct OpenBuffer {
    std::unique_ptr<saefast::Buffer> buffer;
    std::shared_ptr<saefast::QueueSource> queue;  // of a live buffer
    int64_t slot_bytes = 0;                       // of its rows
    OpenBuffer() = default;
    OpenBuffer(OpenBuffer&&) = default;
    ~OpenBuffer() {
        if (buffer && !buffer->lives_here()) buffer.release();
    }
};

using BufferSettings = saefast::Buffer::Settings;
// rows, and for each column its file and the byte it starts at
using ShardTuple = std::tuple<int64_t, std::vector<std::pair<std::string, int64_t>>>;

std::vector<saefast::Shard> as_shards(const std::vector<ShardTuple>& files) {
    std::vector<saefast::Shard> shards;
    for (const auto& [rows, columns] : files) {
        shards.push_back({rows, {}});
        for (const auto& [path, offset] : columns) shards.back().columns.push_back({path, offset});
    }
    return shards;
}

// What a buffer keeps its rows in, as large as its settings say.
struct Storage {
    char *reservoir, *ring;

    Storage(handle reservoir_, handle ring_, const BufferSettings& s)
        : reservoir(bytes_at("reservoir", reservoir_, product({s.capacity, s.slot_bytes}))),
          ring(bytes_at("ring", ring_, product({s.prefetch, s.batch, s.slot_bytes}))) {}

    static char* bytes_at(const char* name, handle tensor, int64_t n) {
        return reinterpret_cast<char*>(at<uint8_t>(name, tensor, n));
    }
};

OpenBuffer open_files(const std::vector<ShardTuple>& files, std::vector<int64_t> column_bytes, handle reservoir,
                      handle ring, const BufferSettings& settings, int64_t epochs, uint64_t seed) {
    const Storage storage(reservoir, ring, settings);
    if (std::accumulate(column_bytes.begin(), column_bytes.end(), int64_t{0}) != settings.slot_bytes)
        throw py::value_error("column_bytes do not add up to slot_bytes");
    std::vector<int64_t> rows;
    for (const auto& file : files) rows.push_back(std::get<0>(file));
    py::gil_scoped_release release;
    saefast::Planner planner(rows, settings.capacity, settings.batch, settings.lag, epochs, seed);
    auto source = std::make_shared<saefast::FileSource>(as_shards(files), std::move(column_bytes));
    OpenBuffer open;
    open.buffer = std::make_unique<saefast::Buffer>(std::move(source), std::move(planner), storage.reservoir,
                                                    storage.ring, settings);
    return open;
}

OpenBuffer open_queue(int64_t room, handle reservoir, handle ring, const BufferSettings& settings, uint64_t seed) {
    const Storage storage(reservoir, ring, settings);
    py::gil_scoped_release release;
    saefast::Planner planner({saefast::Planner::kUnknown}, settings.capacity, settings.batch, settings.lag, 1, seed);
    OpenBuffer open;
    open.queue = std::make_shared<saefast::QueueSource>(settings.slot_bytes, room);
    open.slot_bytes = settings.slot_bytes;
    open.buffer = std::make_unique<saefast::Buffer>(open.queue, std::move(planner), storage.reservoir, storage.ring,
                                                    settings);
    return open;
}

// fn() without the interpreter's lock. Where the interpreter has ended meanwhile, taking the lock back ends the thread by
// unwinding it: out of the destructor of gil_scoped_release, which may not throw, that would abort the process.
template <class Fn>
bool without_lock(const Fn& fn) {
    PyThreadState* state = PyEval_SaveThread();
    bool result = false;
    std::exception_ptr error;
    try {
        result = fn();
    } catch (...) {
        error = std::current_exception();
    }
    PyEval_RestoreThread(state);
    if (error) std::rethrow_exception(error);
    return result;
}

// Waits in short turns, so that Ctrl-C gets through.
template <class Try>
void wait_for(const Try& ready_within) {
    for (bool ready = false; !ready;) {
        ready = without_lock([&] { return ready_within(50); });
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

void bind_buffer(py::module_& m) {
    py::class_<BufferSettings>(m, "BufferSettings")
        .def(py::init([](int64_t slot_bytes, int64_t capacity, int64_t batch, int64_t lag, int64_t prefetch,
                         int threads, int consumers, int64_t first_batch) {
                 return BufferSettings{slot_bytes, capacity, batch, lag, prefetch, threads, consumers, first_batch};
             }),
             py::kw_only(), "slot_bytes"_a, "capacity"_a, "batch"_a, "lag"_a, "prefetch"_a, "threads"_a, "consumers"_a,
             "first_batch"_a);
    py::class_<OpenBuffer>(m, "Buffer")
        .def(
            "next",
            [](OpenBuffer& self, int consumer) {
                saefast::Batch batch;
                wait_for([&](int timeout_ms) { return self.buffer->next(consumer, timeout_ms, batch); });
                return std::make_tuple(batch.number, batch.n_rows, batch.place);
            },
            "consumer"_a)
        .def("rows", [](OpenBuffer& self, int64_t place) { return self.buffer->rows(place); })
        .def("push",
             [](OpenBuffer& self, handle rows) {
                 const int64_t n = row_shape("rows", rows).rows;
                 const char* from = raw("rows", rows, product({n, self.slot_bytes}));
                 return without_lock([&] { return self.queue->push(from, n, 50); });
             })
        .def("finish", [](OpenBuffer& self, const std::string& error) { self.queue->finish(error); })
        .def("lives_here", [](OpenBuffer& self) { return self.buffer->lives_here(); })
        .def("close", [](OpenBuffer& self) {
            if (!self.buffer->lives_here()) return;
            py::gil_scoped_release release;
            self.buffer->close();
        });
    m.def("open_files", &open_files, "files"_a, "column_bytes"_a, "reservoir"_a, "ring"_a, "settings"_a, "epochs"_a,
          "seed"_a);
    m.def("open_queue", &open_queue, "room"_a, "reservoir"_a, "ring"_a, "settings"_a, "seed"_a);
}

// x (B, D) and W (L, D) of one type; bias, scale and threshold (L,) fp32 or None; ids (n,) int64 or None for all.
saefast::Encoder make_encoder(handle x, handle W, handle bias, handle scale, handle threshold, handle ids) {
    const int64_t B = size("x", x, 0, 2), D = size("x", x, 1, 2), L = size("W", W, 0, 2);
    const int64_t n_ids = ids.is_none() ? L : length("ids", ids);
    const Floats rows("x", x, product({B, D})), weights("W", W, product({L, D}));
    if (weights.type != rows.type) throw unlike("W", W, "the dtype of x");
    return {rows.type,
            rows.at,
            weights.at,
            B,
            D,
            L,
            maybe<float>("bias", bias, L),
            maybe<float>("scale", scale, L),
            maybe<float>("threshold", threshold, L),
            maybe<int64_t>("ids", ids, n_ids),
            n_ids};
}

void bind_encode(py::module_& m) {
    m.def(
        "encode_topk",
        [](handle x, handle W, handle bias, handle scale, handle ids, int64_t k, bool relu, handle acts, handle idx,
           int64_t max_scratch_bytes, const std::optional<std::string>& kernel, int n_threads) {
            const auto encoder = make_encoder(x, W, bias, scale, py::none(), ids);
            auto* to_acts = at<float>("acts", acts, product({encoder.n_rows, k}));
            auto* to_idx = at<int32_t>("idx", idx, product({encoder.n_rows, k}));
            py::gil_scoped_release release;
            saefast::encode_topk(encoder, {k, relu, max_scratch_bytes, kernel ? kernel->c_str() : nullptr, n_threads},
                                 to_acts, to_idx);
        },
        "x"_a, "W"_a, "bias"_a, "scale"_a, "ids"_a, "k"_a, "relu"_a, "acts"_a, "idx"_a, "max_scratch_bytes"_a,
        "kernel"_a, "n_threads"_a);
    m.def(
        "encode_topk_mixed",
        [](handle x_low, handle W_low, handle x, handle W, handle bias, handle scale, handle ids, int64_t n_candidates,
           int64_t k, bool relu, handle acts, handle idx, int64_t max_scratch_bytes, int n_threads) {
            const auto low = make_encoder(x_low, W_low, bias, scale, py::none(), ids);
            const auto* wide_x = at<float>("x", x, product({low.n_rows, low.d_in}));
            const auto* wide_W = at<float>("W", W, product({low.n_latents, low.d_in}));
            auto* to_acts = at<float>("acts", acts, product({low.n_rows, k}));
            auto* to_idx = at<int32_t>("idx", idx, product({low.n_rows, k}));
            py::gil_scoped_release release;
            saefast::encode_topk_mixed(low, {n_candidates, relu, max_scratch_bytes, nullptr, n_threads}, wide_x,
                                       wide_W, k, to_acts, to_idx);
        },
        "x_low"_a, "W_low"_a, "x"_a, "W"_a, "bias"_a, "scale"_a, "ids"_a, "n_candidates"_a, "k"_a, "relu"_a, "acts"_a,
        "idx"_a, "max_scratch_bytes"_a, "n_threads"_a);
    m.def("tile_kernel_names", &saefast::tile_kernel_names, "bf16"_a);
    py::class_<saefast::ThresholdCode>(m, "ThresholdCode")
        .def(py::init([](handle x, handle W, handle bias, handle threshold, int64_t max_scratch_bytes,
                         const std::optional<std::string>& kernel, int n_threads) {
                 const auto encoder = make_encoder(x, W, bias, py::none(), threshold, py::none());
                 if (encoder.threshold == nullptr) throw py::type_error("threshold is None: expected one per latent");
                 py::gil_scoped_release release;
                 return std::make_unique<saefast::ThresholdCode>(encoder, max_scratch_bytes,
                                                                 kernel ? kernel->c_str() : nullptr, n_threads);
             }),
             "x"_a, "W"_a, "bias"_a, "threshold"_a, "max_scratch_bytes"_a, "kernel"_a, "n_threads"_a)
        .def("size", &saefast::ThresholdCode::size)
        .def(
            "write",
            [](const saefast::ThresholdCode& code, handle row_ptr, handle idx, handle acts) {
                auto* to_row_ptr = at<int64_t>("row_ptr", row_ptr, code.n_rows() + 1);
                auto* to_idx = at<int32_t>("idx", idx, code.size());
                auto* to_acts = at<float>("acts", acts, code.size());
                py::gil_scoped_release release;
                code.write(to_row_ptr, to_idx, to_acts);
            },
            "row_ptr"_a, "idx"_a, "acts"_a);
}

void bind_group_max(py::module_& m) {
    m.def(
        "encode_group_max",
        [](handle x, handle W, handle bias, handle scale, int64_t groups, int64_t best, handle pre, handle idx,
           int64_t max_scratch_bytes, const std::optional<std::string>& kernel, int n_threads) {
            const auto encoder = make_encoder(x, W, bias, scale, py::none(), py::none());
            auto* to_pre = at<float>("pre", pre, product({encoder.n_rows, groups, best}));
            auto* to_idx = at<int32_t>("idx", idx, product({encoder.n_rows, groups, best}));
            py::gil_scoped_release release;
            saefast::encode_group_max(
                encoder, {groups, best, max_scratch_bytes, kernel ? kernel->c_str() : nullptr, n_threads}, to_pre,
                to_idx);
        },
        "x"_a, "W"_a, "bias"_a, "scale"_a, "groups"_a, "best"_a, "pre"_a, "idx"_a, "max_scratch_bytes"_a, "kernel"_a,
        "n_threads"_a);
}

// W (L, D) of any float format, idx (B, K) int32 or int64.
saefast::Gathered make_gathered(handle W, handle idx, int n_threads) {
    const int64_t L = size("W", W, 0, 2), D = size("W", W, 1, 2), B = size("idx", idx, 0, 2), K = size("idx", idx, 1, 2);
    const Floats weights("W", W, product({L, D}));
    const bool wide = dtype(idx).is(dtype_of<int64_t>());
    const int64_t n = product({B, K});
    const void* entries = wide ? static_cast<const void*>(at<int64_t>("idx", idx, n)) : at<int32_t>("idx", idx, n);
    return {weights.type, weights.at, L, D, entries, wide, B, K, n_threads};
}

void bind_select_kth(py::module_& m) {
    m.def(
        "select_kth",
        [](handle keys, int64_t k) {
            const int64_t n = length("keys", keys);
            const auto* from = at<int32_t>("keys", keys, n);
            py::gil_scoped_release release;
            return saefast::select_kth(from, n, k);
        },
        "keys"_a, "k"_a);
}

void bind_spmm(py::module_& m) {
    m.def(
        "spmm",
        [](handle W, handle idx, handle acts, handle out, int n_threads) {
            const auto code = make_gathered(W, idx, n_threads);
            const auto* values = at<float>("acts", acts, product({code.n_rows, code.k}));
            auto* to = at<float>("out", out, product({code.n_rows, code.d}));
            py::gil_scoped_release release;
            saefast::spmm(code, values, to);
        },
        "W"_a, "idx"_a, "acts"_a, "out"_a, "n_threads"_a);
    m.def(
        "sddmm",
        [](handle W, handle idx, handle x, handle out, int n_threads) {
            const auto code = make_gathered(W, idx, n_threads);
            const auto* values = at<float>("x", x, product({code.n_rows, code.d}));
            auto* to = at<float>("out", out, product({code.n_rows, code.k}));
            py::gil_scoped_release release;
            saefast::sddmm(code, values, to);
        },
        "W"_a, "idx"_a, "x"_a, "out"_a, "n_threads"_a);
}

// Plans and reads, without threads or a reservoir: for one that lives on a GPU, which Python keeps (data/device_reservoir.py).
struct RowStream {
    saefast::Planner planner;
    std::unique_ptr<saefast::FileSource> source;
    int64_t row_bytes = 0;
};

using Int32s = py::array_t<int32_t>;
using Int64s = py::array_t<int64_t>;

template <class T>
py::array_t<T> as_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void bind_row_stream(py::module_& m) {
    py::class_<RowStream>(m, "RowStream")
        .def(py::init([](const std::vector<ShardTuple>& files, std::vector<int64_t> column_bytes, int64_t capacity,
                         int64_t batch, int64_t lag, uint64_t seed, int64_t first_batch) {
                 std::vector<int64_t> rows;
                 for (const auto& file : files) rows.push_back(std::get<0>(file));
                 py::gil_scoped_release release;
                 RowStream stream{saefast::Planner(rows, capacity, batch, lag, 0, seed), nullptr, 0};
                 for (int64_t bytes : column_bytes) stream.row_bytes += bytes;
                 stream.source = std::make_unique<saefast::FileSource>(as_shards(files), std::move(column_bytes));
                 stream.planner.skip_to(first_batch);
                 return stream;
             }),
             "files"_a, "column_bytes"_a, "capacity"_a, "batch"_a, "lag"_a, "seed"_a, "first_batch"_a)
        // What each slot holds at this position, -1 for nothing.
        .def("resident", [](RowStream& self) { return as_array(self.planner.resident()); })
        // (slots, rows, refill): what the next batch draws, and the rows that its first slots take next.
        .def("next",
             [](RowStream& self) {
                 const auto plan = self.planner.next();
                 return py::make_tuple(as_array(plan.slots), as_array(plan.rows), as_array(plan.refill));
             })
        // Reads rows, one after another, to `out`. From any thread.
        .def("read", [](RowStream& self, const Int64s& rows, handle out) {
            const int64_t* numbers = rows.data();
            const int64_t n = rows.size();
            uint8_t* to = at<uint8_t>("out", out, product({n, self.row_bytes}), true);
            py::gil_scoped_release release;
            std::vector<int32_t> places(static_cast<size_t>(n));
            std::iota(places.begin(), places.end(), 0);
            self.source->fill(0, numbers, places.data(), n, reinterpret_cast<char*>(to), self.row_bytes);
        });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "saefast's C++ half; used through saefast.ops.native";
    // saefast/extension.py has the same number: both are raised where the bindings change.
    m.attr("INTERFACE") = 7;
#ifdef SAEFAST_CUDA
    m.attr("HAS_CUDA") = true;
#else
    m.attr("HAS_CUDA") = false;
#endif
    bind_gather(m);
    bind_encode(m);
    bind_group_max(m);
    bind_select_kth(m);
    bind_spmm(m);
    bind_row_operations(m);
    bind_latents(m);
    bind_buffer(m);
    bind_row_stream(m);
}
