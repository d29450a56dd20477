// The Python face of csrc/: the only file that includes pybind11. Tensors arrive as integer addresses and sizes; the
// Python wrappers in saefast/native.py have checked dtype, shape and contiguity. One bind_ function per source file.
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
#include "mixed.hpp"
#include "spmm.hpp"
#include "threshold.hpp"
#include "topk.hpp"
#include "rows.hpp"

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

// A buffer with the source it reads. In a forked child it is left where it is: see Buffer::lives_here.
struct OpenBuffer {
    std::unique_ptr<saefast::Buffer> buffer;
    std::shared_ptr<saefast::QueueSource> queue;  // of a live buffer
    OpenBuffer() = default;
    OpenBuffer(OpenBuffer&&) = default;
    ~OpenBuffer() {
        if (buffer && !buffer->lives_here()) buffer.release();
    }
};

using BufferSettings = saefast::Buffer::Settings;
// path, rows, and the byte each column starts at
using ShardTuple = std::tuple<std::string, int64_t, std::vector<int64_t>>;

std::vector<saefast::Shard> as_shards(const std::vector<ShardTuple>& files) {
    std::vector<saefast::Shard> shards;
    for (const auto& [path, rows, offsets] : files) shards.push_back({path, rows, offsets});
    return shards;
}

OpenBuffer open_files(const std::vector<ShardTuple>& files, std::vector<int64_t> column_bytes, Address reservoir,
                      Address ring, const BufferSettings& settings, int64_t epochs, uint64_t seed) {
    std::vector<int64_t> rows;
    for (const auto& file : files) rows.push_back(std::get<1>(file));
    py::gil_scoped_release release;
    saefast::Planner planner(rows, settings.capacity, settings.batch, settings.lag, epochs, seed);
    auto source = std::make_shared<saefast::FileSource>(as_shards(files), std::move(column_bytes));
    OpenBuffer open;
    open.buffer = std::make_unique<saefast::Buffer>(std::move(source), std::move(planner), at<char>(reservoir),
                                                    at<char>(ring), settings);
    return open;
}

OpenBuffer open_queue(int64_t room, Address reservoir, Address ring, const BufferSettings& settings, uint64_t seed) {
    py::gil_scoped_release release;
    saefast::Planner planner({saefast::Planner::kUnknown}, settings.capacity, settings.batch, settings.lag, 1, seed);
    OpenBuffer open;
    open.queue = std::make_shared<saefast::QueueSource>(settings.slot_bytes, room);
    open.buffer = std::make_unique<saefast::Buffer>(open.queue, std::move(planner), at<char>(reservoir),
                                                    at<char>(ring), settings);
    return open;
}

// Waits in short turns, so that Ctrl-C gets through.
template <class Try>
void wait_for(const Try& ready_within) {
    for (bool ready = false; !ready;) {
        {
            py::gil_scoped_release release;
            ready = ready_within(50);
        }
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
             [](OpenBuffer& self, Address rows, int64_t n) {
                 py::gil_scoped_release release;
                 return self.queue->push(at<const char>(rows), n, 50);
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

// What exists for either kind of weight matrix.
template <class Matrix, class Job>
void bind_row_ops(py::module_& m) {
    using namespace saefast;
    py::class_<Job>(m, Job::kBuffers == 1 ? "AdamJob" : "LeanJob")
        .def(py::init([](const Matrix& matrix, const AdamStep& step, const RowGradient& gradient, Address rows,
                         int64_t n, Address squares) {
                 return Job{matrix, step, gradient, at<const int32_t>(rows), n, at<float>(squares)};
             }),
             "matrix"_a, "step"_a, "gradient"_a, "rows"_a, "n"_a, "squares"_a);
    m.def(
        "catch_up",
        [](const Matrix& matrix, const AdamStep& step, Address rows, int64_t n, int n_threads) {
            py::gil_scoped_release release;
            catch_up(matrix, step, at<const int32_t>(rows), n, n_threads);
        },
        "matrix"_a, "step"_a, "rows"_a, "n"_a, "n_threads"_a);
    m.def(
        "normalise_rows",
        [](const Matrix& matrix, const AdamStep& step, Address rows, int64_t n, int n_threads) {
            py::gil_scoped_release release;
            normalise_rows(matrix, step, at<const int32_t>(rows), n, n_threads);
        },
        "matrix"_a, "step"_a, "rows"_a, "n"_a, "n_threads"_a);
    m.def("gradient_squares", py::overload_cast<const Job&, int>(&gradient_squares), "job"_a, "n_threads"_a,
          py::call_guard<py::gil_scoped_release>());
}

void bind_rows(py::module_& m) {
    using namespace saefast;
    py::class_<AdamMatrix>(m, "AdamMatrix")
        .def(py::init([](Address w, Address m, Address v, Address last_step, Address shadow, Address norms,
                         int64_t n_rows, int64_t d) {
                 return AdamMatrix{at<float>(w),         at<float>(m),     at<float>(v), at<int32_t>(last_step),
                                   at<uint16_t>(shadow), at<float>(norms), n_rows,       d};
             }),
             "w"_a, "m"_a, "v"_a, "last_step"_a, "shadow"_a, "norms"_a, "n_rows"_a, "d"_a);
    py::class_<LeanMatrix>(m, "LeanMatrix")
        .def(py::init([](Address w, Address m, Address scale, Address v, Address last_step, Address norms,
                         int64_t n_rows, int64_t d, int64_t blocks, uint32_t seed) {
                 return LeanMatrix{at<uint16_t>(w),        at<int8_t>(m),    at<uint16_t>(scale), at<float>(v),
                                   at<int32_t>(last_step), at<float>(norms), n_rows,              d,
                                   blocks,                 seed};
             }),
             "w"_a, "m"_a, "scale"_a, "v"_a, "last_step"_a, "norms"_a, "n_rows"_a, "d"_a, "blocks"_a, "seed"_a);
    py::class_<AdamStep>(m, "AdamStep")
        .def(py::init([](int32_t step, double beta1, double beta2, double lr, double eps, Address drift,
                         Address drift_eps, float grad_scale, bool project, int norm) {
                 return AdamStep{step,       beta1,   beta2, lr, eps, at<const double>(drift), at<const double>(drift_eps),
                                 grad_scale, project, static_cast<Norm>(norm)};
             }),
             "step"_a, "beta1"_a, "beta2"_a, "lr"_a, "eps"_a, "drift"_a, "drift_eps"_a, "grad_scale"_a, "project"_a,
             "norm"_a);
    py::class_<RowGradient>(m, "RowGradient")
        .def(py::init([](Address source, Address offsets, Address row, Address coef) {
                 return RowGradient{at<const float>(source), at<const int32_t>(offsets), at<const int32_t>(row),
                                    at<const float>(coef)};
             }),
             "source"_a, "offsets"_a, "row"_a, "coef"_a);
    m.def(
        "group_runs",
        [](Address idx, Address keep, int64_t n, int64_t n_latents, Address order, Address latents, Address offsets) {
            py::gil_scoped_release release;
            return group_runs(at<const int32_t>(idx), at<const uint8_t>(keep), n, n_latents, at<int32_t>(order),
                              at<int32_t>(latents), at<int32_t>(offsets));
        },
        "idx"_a, "keep"_a, "n"_a, "n_latents"_a, "order"_a, "latents"_a, "offsets"_a);
    m.def(
        "fill_entries",
        [](Address acts, Address grad, const std::vector<int64_t>& columns, const std::vector<int32_t>& bounds,
           int64_t n_tokens, Address order, Address latents, Address offsets, int64_t n_runs, int64_t n_latents,
           Address dec_row, Address dec_coef, Address enc_row, Address enc_coef, Address grad_by_latent) {
            py::gil_scoped_release release;
            fill_entries({at<const float>(acts), at<const float>(grad), columns.data(),
                          static_cast<int64_t>(columns.size()), bounds.data(), static_cast<int64_t>(bounds.size()),
                          n_tokens},
                         at<const int32_t>(order), at<const int32_t>(latents), at<const int32_t>(offsets), n_runs,
                         n_latents, at<int32_t>(dec_row), at<float>(dec_coef), at<int32_t>(enc_row),
                         at<float>(enc_coef), at<float>(grad_by_latent));
        },
        "acts"_a, "grad"_a, "columns"_a, "bounds"_a, "n_tokens"_a, "order"_a, "latents"_a, "offsets"_a, "n_runs"_a,
        "n_latents"_a, "dec_row"_a, "dec_coef"_a, "enc_row"_a, "enc_coef"_a, "grad_by_latent"_a);
    bind_row_ops<AdamMatrix, AdamJob>(m);
    bind_row_ops<LeanMatrix, LeanJob>(m);
    m.def("update_rows", &update_rows, "jobs"_a, "lean_jobs"_a, "n_threads"_a,
          py::call_guard<py::gil_scoped_release>());
    m.def(
        "decode_loss",
        [](Address x, Address acts, Address idx, Address W_dec, bool bf16, Address b_dec, Address bounds, Address weight,
           int64_t B, int64_t K, int64_t P, int64_t d, int64_t n_latents, bool by_latent, Address residual, Address squares,
           Address grad_acts, Address error, bool relu, int n_threads) {
            py::gil_scoped_release release;
            decode_loss({at<const float>(x), at<const float>(acts), at<const int32_t>(idx), at<const void>(W_dec), bf16,
                         at<const float>(b_dec), at<const int32_t>(bounds), at<const float>(weight), B, K, P, d,
                         n_latents, by_latent, at<float>(residual), at<float>(squares), at<float>(grad_acts),
                         at<float>(error), relu},
                        n_threads);
        },
        "x"_a, "acts"_a, "idx"_a, "W_dec"_a, "bf16"_a, "b_dec"_a, "bounds"_a, "weight"_a, "B"_a, "K"_a, "P"_a, "d"_a,
        "n_latents"_a, "by_latent"_a, "residual"_a, "squares"_a, "grad_acts"_a, "error"_a, "relu"_a, "n_threads"_a);
    m.def(
        "weighted_row_sum",
        [](Address W, bool bf16, int64_t d, Address rows, Address coef, int64_t n, Address out, int n_threads) {
            py::gil_scoped_release release;
            weighted_row_sum(at<const void>(W), bf16, d, at<const int32_t>(rows), at<const float>(coef), n, at<float>(out),
                             n_threads);
        },
        "W"_a, "bf16"_a, "d"_a, "rows"_a, "coef"_a, "n"_a, "out"_a, "n_threads"_a);
    m.def(
        "moments",
        [](Address x, int64_t n, int64_t d, int n_threads) {
            py::gil_scoped_release release;
            double variance = 0, squares = 0;
            moments(at<const float>(x), n, d, &variance, &squares, n_threads);
            return std::pair<double, double>(variance, squares);
        },
        "x"_a, "n"_a, "d"_a, "n_threads"_a);
}

using EncoderArguments = std::tuple<int, Address, Address, int64_t, int64_t, int64_t>;  // type, x, W, B, D, L

// x (B, D) and W (L, D) of one type; bias, scale and threshold (L,) fp32 or 0; ids (n_ids,) int64 or 0 for all latents.
saefast::Encoder make_encoder(const EncoderArguments& matrices, Address bias, Address scale, Address threshold,
                              Address ids, int64_t n_ids) {
    const auto [type, x, W, n_rows, d_in, n_latents] = matrices;
    return {static_cast<saefast::Float>(type), at<const void>(x), at<const void>(W), n_rows, d_in, n_latents,
            at<const float>(bias), at<const float>(scale), at<const float>(threshold), at<const int64_t>(ids), n_ids};
}

void bind_encode(py::module_& m) {
    m.def(
        "encode_topk",
        [](const EncoderArguments& matrices, Address bias, Address scale, Address ids, int64_t n_ids, int64_t k,
           bool relu, Address acts, Address idx, int64_t max_scratch_bytes, const std::optional<std::string>& kernel,
           int n_threads) {
            py::gil_scoped_release release;
            saefast::encode_topk(make_encoder(matrices, bias, scale, 0, ids, n_ids),
                                 {k, relu, max_scratch_bytes, kernel ? kernel->c_str() : nullptr, n_threads},
                                 at<float>(acts), at<int32_t>(idx));
        },
        "matrices"_a, "bias"_a, "scale"_a, "ids"_a, "n_ids"_a, "k"_a, "relu"_a, "acts"_a, "idx"_a,
        "max_scratch_bytes"_a, "kernel"_a, "n_threads"_a);
    m.def(
        "encode_topk_mixed",
        [](const EncoderArguments& low, Address x, Address W, Address bias, Address scale, Address ids, int64_t n_ids,
           int64_t n_candidates, int64_t k, bool relu, Address acts, Address idx, int64_t max_scratch_bytes,
           int n_threads) {
            py::gil_scoped_release release;
            saefast::encode_topk_mixed(make_encoder(low, bias, scale, 0, ids, n_ids),
                                       {n_candidates, relu, max_scratch_bytes, nullptr, n_threads}, at<const float>(x),
                                       at<const float>(W), k, at<float>(acts), at<int32_t>(idx));
        },
        "low"_a, "x"_a, "W"_a, "bias"_a, "scale"_a, "ids"_a, "n_ids"_a, "n_candidates"_a, "k"_a, "relu"_a, "acts"_a,
        "idx"_a, "max_scratch_bytes"_a, "n_threads"_a);
    m.def("tile_kernel_names", &saefast::tile_kernel_names, "bf16"_a);
    py::class_<saefast::ThresholdCode>(m, "ThresholdCode")
        .def(py::init([](const EncoderArguments& matrices, Address bias, Address threshold, int64_t max_scratch_bytes,
                         const std::optional<std::string>& kernel, int n_threads) {
                 py::gil_scoped_release release;
                 const auto encoder = make_encoder(matrices, bias, 0, threshold, 0, std::get<5>(matrices));
                 return std::make_unique<saefast::ThresholdCode>(encoder, max_scratch_bytes,
                                                                 kernel ? kernel->c_str() : nullptr, n_threads);
             }),
             "matrices"_a, "bias"_a, "threshold"_a, "max_scratch_bytes"_a, "kernel"_a, "n_threads"_a)
        .def("size", &saefast::ThresholdCode::size)
        .def(
            "write",
            [](const saefast::ThresholdCode& code, Address row_ptr, Address idx, Address acts) {
                py::gil_scoped_release release;
                code.write(at<int64_t>(row_ptr), at<int32_t>(idx), at<float>(acts));
            },
            "row_ptr"_a, "idx"_a, "acts"_a);
}

using GatheredArguments = std::tuple<int, Address, int64_t, int64_t, Address, bool, int64_t, int64_t, int>;

// type, W (L, D), L, D, idx (B, K), whether idx is int64, B, K, threads
saefast::Gathered make_gathered(const GatheredArguments& code) {
    const auto [type, W, n_latents, d, idx, wide_idx, n_rows, k, n_threads] = code;
    return {static_cast<saefast::Float>(type), at<const void>(W), n_latents, d, at<const void>(idx), wide_idx, n_rows,
            k, n_threads};
}

void bind_spmm(py::module_& m) {
    m.def(
        "spmm",
        [](const GatheredArguments& code, Address acts, Address out) {
            py::gil_scoped_release release;
            saefast::spmm(make_gathered(code), at<const float>(acts), at<float>(out));
        },
        "code"_a, "acts"_a, "out"_a);
    m.def(
        "sddmm",
        [](const GatheredArguments& code, Address x, Address out) {
            py::gil_scoped_release release;
            saefast::sddmm(make_gathered(code), at<const float>(x), at<float>(out));
        },
        "code"_a, "x"_a, "out"_a);
}

// Plans and reads, without threads or a reservoir: for one that lives on a GPU, which Python keeps (data/buffer.py).
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
                 for (const auto& file : files) rows.push_back(std::get<1>(file));
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
        .def("read", [](RowStream& self, const Int64s& rows, Address out) {
            const int64_t* numbers = rows.data();
            const int64_t n = rows.size();
            py::gil_scoped_release release;
            std::vector<int32_t> places(static_cast<size_t>(n));
            std::iota(places.begin(), places.end(), 0);
            self.source->fill(0, numbers, places.data(), n, at<char>(out), self.row_bytes);
        });
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
    bind_encode(m);
    bind_spmm(m);
    bind_rows(m);
    bind_buffer(m);
    bind_row_stream(m);
}
