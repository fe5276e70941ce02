// The only file that knows Python. Addresses, lengths and scalars come in, checked by
// zo_kernels/ops; torch is not needed to build or load this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "exceptions.h"
#include "ieee.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using zo::Job;
using zo::Task;

// Python's numbers as binary32. Under flush-to-zero the conversion would lose subnormals, so it
// is done here and not by pybind11, and out of line, so that it stays inside the guard.
__attribute__((noinline)) std::vector<float> as_floats(const std::vector<double>& values) {
  const zo::IeeeArithmetic guard;
  return std::vector<float>(values.begin(), values.end());
}

const zo::Distribution& distribution_of(const std::string& isa, int distribution) {
  if (distribution < 0 || distribution >= zo::DISTRIBUTIONS)
    throw std::invalid_argument("unknown distribution code");
  return zo::kernels_named(isa).of[distribution];
}

void check_dtype(int dtype) {
  if (dtype < 0 || dtype >= zo::DTYPES) throw std::invalid_argument("unknown dtype code");
}

Job job_of(uint64_t dst, uint64_t numel, uint64_t offset, uint64_t seed, uint32_t stream) {
  Job job;
  job.dst = reinterpret_cast<void*>(dst);
  job.begin = offset;
  job.end = offset + numel;
  job.seed = seed;
  job.stream = stream;
  return job;
}

void combine(const std::string& isa, const std::vector<uint64_t>& dst,
             const std::vector<uint64_t>& src, const std::vector<uint64_t>& numel,
             const std::vector<uint64_t>& offset, const std::vector<uint32_t>& stream,
             const std::vector<uint32_t>& direction, const std::vector<double>& scale,
             double src_scale, uint64_t seed, int src_dtype, int dst_dtype, bool stochastic,
             int distribution, const std::vector<uint64_t>& changes, int threads) {
  const size_t tensors = dst.size();
  if (src.size() != tensors || numel.size() != tensors || offset.size() != tensors ||
      stream.size() != tensors || scale.size() != tensors * direction.size() ||
      (!changes.empty() && changes.size() != tensors))
    throw std::invalid_argument("combine: lists of different lengths");
  if (direction.empty()) throw std::invalid_argument("combine: no directions");
  check_dtype(src_dtype);
  check_dtype(dst_dtype);
  const zo::Kernel kernel =
      distribution_of(isa, distribution).combine[src_dtype].at[dst_dtype][stochastic ? 1 : 0];
  const std::vector<float> factors = as_floats(scale);
  const float src_factor = as_floats({src_scale})[0];
  std::vector<Task> tasks;
  tasks.reserve(tensors);
  for (size_t t = 0; t < tensors; ++t) {
    Job job = job_of(dst[t], numel[t], offset[t], seed, stream[t]);
    job.src = reinterpret_cast<const void*>(src[t]);
    job.directions = static_cast<int>(direction.size());
    job.direction = direction.data();
    job.scale = factors.data() + t * direction.size();
    job.src_scale = src_factor;
    if (!changes.empty()) job.changes = reinterpret_cast<double*>(changes[t]);
    tasks.push_back({kernel, job, zo::itemsize(src_dtype), zo::itemsize(dst_dtype)});
  }
  const py::gil_scoped_release release;
  zo::run(tasks, threads);
}

void pair(const std::string& isa, const std::vector<uint64_t>& plus,
          const std::vector<uint64_t>& minus, const std::vector<uint64_t>& src,
          const std::vector<uint64_t>& numel, const std::vector<uint64_t>& offset,
          const std::vector<uint32_t>& stream, uint32_t direction, const std::vector<double>& scale,
          uint64_t seed, int dtype, int distribution, int threads) {
  const size_t tensors = plus.size();
  if (minus.size() != tensors || src.size() != tensors || numel.size() != tensors ||
      offset.size() != tensors || stream.size() != tensors || scale.size() != tensors)
    throw std::invalid_argument("pair: lists of different lengths");
  check_dtype(dtype);
  const zo::Kernel kernel = distribution_of(isa, distribution).pair[dtype];
  const std::vector<float> factors = as_floats(scale);
  const int itemsize = zo::itemsize(dtype);
  std::vector<Task> tasks;
  for (size_t t = 0; t < tensors; ++t) {
    Job job = job_of(plus[t], numel[t], offset[t], seed, stream[t]);
    job.src = reinterpret_cast<const void*>(src[t]);
    job.other = reinterpret_cast<void*>(minus[t]);
    job.direction = &direction;
    job.scale = &factors[t];
    tasks.push_back({kernel, job, itemsize, itemsize, itemsize});
  }
  const py::gil_scoped_release release;
  zo::run(tasks, threads);
}

void advance(const std::string& isa, const std::vector<uint64_t>& dst,
             const std::vector<uint64_t>& residual, const std::vector<uint64_t>& numel,
             const std::vector<uint64_t>& offset, const std::vector<uint32_t>& stream,
             const std::vector<uint32_t>& direction, const std::vector<double>& scale,
             const std::vector<int>& length, const std::vector<double>& src_scale, uint64_t seed,
             int dtype, bool stochastic, int distribution, const std::vector<uint64_t>& changes,
             int threads) {
  const size_t tensors = dst.size();
  size_t directions = 0;
  for (const int n : length) {
    if (n < 1) throw std::invalid_argument("advance: an update without directions");
    directions += n;
  }
  if ((!residual.empty() && residual.size() != tensors) || numel.size() != tensors ||
      offset.size() != tensors || stream.size() != tensors ||
      scale.size() != tensors * directions || direction.size() != directions ||
      src_scale.size() != length.size() || (!changes.empty() && changes.size() != tensors))
    throw std::invalid_argument("advance: lists of different lengths");
  check_dtype(dtype);
  const int rounding =
      !residual.empty() ? zo::RESIDUAL : (stochastic ? zo::STOCHASTIC : zo::NEAREST);
  const zo::Kernel kernel = distribution_of(isa, distribution).advance[dtype][rounding];
  const std::vector<float> factors = as_floats(scale), src_factors = as_floats(src_scale);
  std::vector<Task> tasks;
  for (size_t t = 0; t < tensors; ++t) {
    Job job = job_of(dst[t], numel[t], offset[t], seed, stream[t]);
    if (!residual.empty()) job.other = reinterpret_cast<void*>(residual[t]);
    job.directions = static_cast<int>(directions);
    job.direction = direction.data();
    job.scale = factors.data() + t * directions;
    job.updates = static_cast<int>(length.size());
    job.lengths = length.data();
    job.src_scales = src_factors.data();
    if (!changes.empty()) job.changes = reinterpret_cast<double*>(changes[t]);
    tasks.push_back({kernel, job, 0, zo::itemsize(dtype), 1});
  }
  const py::gil_scoped_release release;
  zo::run(tasks, threads);
}

// held and held_scale: what an earlier call returned, and its scales; none if the tensors hold
// their own weights. No scales: the weights come back. kept: whether to return what gives them
// back.
std::shared_ptr<zo::Store> swap(
    const std::string& isa, const std::vector<uint64_t>& dst, const std::vector<uint64_t>& numel,
    const std::vector<uint64_t>& offset, const std::vector<uint32_t>& stream, uint32_t direction,
    const std::shared_ptr<zo::Store>& held, const std::vector<double>& held_scale,
    const std::vector<double>& scale, bool keep, double src_scale, uint64_t seed, int dtype,
    bool stochastic, int distribution, const std::vector<uint64_t>& changes, int threads) {
  const size_t tensors = dst.size();
  if (numel.size() != tensors || offset.size() != tensors || stream.size() != tensors ||
      held_scale.size() != (held ? tensors : 0) || (!scale.empty() && scale.size() != tensors) ||
      (!changes.empty() && changes.size() != tensors))
    throw std::invalid_argument("swap: lists of different lengths");
  if ((!held && !keep) || (keep && (scale.empty() || stochastic)))
    throw std::invalid_argument("swap: neither hold, swap nor release");
  check_dtype(dtype);
  const int what =
      keep ? (held ? zo::SWAP : zo::HOLD) : (stochastic ? zo::RELEASE_STOCHASTIC : zo::RELEASE);
  const zo::Kernel kernel = distribution_of(isa, distribution).swap[dtype][what];
  const std::vector<float> factors = as_floats(scale), held_factors = as_floats(held_scale);
  std::vector<Task> tasks;
  for (size_t t = 0; t < tensors; ++t) {
    Job job = job_of(dst[t], numel[t], offset[t], seed, stream[t]);
    job.direction = &direction;
    if (!scale.empty()) job.scale = &factors[t];
    if (held) job.held_scale = held_factors[t];
    job.src_scale = as_floats({src_scale})[0];
    if (!changes.empty()) job.changes = reinterpret_cast<double*>(changes[t]);
    tasks.push_back({kernel, job, 0, zo::itemsize(dtype)});
  }
  const std::shared_ptr<zo::Store> kept = keep ? std::make_shared<zo::Store>() : nullptr;
  const py::gil_scoped_release release;
  zo::run_swap(tasks, threads, held.get(), kept.get());
  return kept;
}

// What a format is: top value, stored mantissa bits, exponent of the least normal value, and
// whether scales are powers of two.
using Format = std::tuple<int, float, int, int, bool>;

// No dst: finds the ends of the groups, into lows and highs if there are any.
zo::QuantJob quant_job(uint64_t dst, uint64_t src, uint64_t groups, uint64_t group,
                       const Format& format, uint64_t scales, uint64_t lows, uint64_t highs) {
  if (group == 0 || (lows == 0) != (highs == 0) || (dst != 0 && lows != 0))
    throw std::invalid_argument("fake_quant: neither values nor ends");
  zo::QuantJob job;
  job.src = reinterpret_cast<const void*>(src);
  job.dst = reinterpret_cast<void*>(dst);
  job.groups = groups;
  job.group = group;
  std::tie(std::ignore, job.top, job.mantissa, job.min_exponent, job.power_of_two) = format;
  job.scales = reinterpret_cast<const float*>(scales);
  job.lows = reinterpret_cast<float*>(lows);
  job.highs = reinterpret_cast<float*>(highs);
  return job;
}

zo::QuantKernel quant_kernel(const std::string& isa, int dtype, const Format& format) {
  check_dtype(dtype);
  const int code = std::get<0>(format);
  if (code < 0 || code >= zo::FORMATS) throw std::invalid_argument("unknown format code");
  return zo::kernels_named(isa).fake_quant[dtype].of[code];
}

// Returns the ends of all groups.
std::pair<float, float> fake_quant(const std::string& isa, uint64_t dst, uint64_t src,
                                   uint64_t groups, uint64_t group, int dtype, const Format& format,
                                   uint64_t scales, uint64_t lows, uint64_t highs, int threads) {
  const zo::QuantJob job = quant_job(dst, src, groups, group, format, scales, lows, highs);
  const zo::QuantKernel kernel = quant_kernel(isa, dtype, format);
  const py::gil_scoped_release release;
  const zo::Extremes ends = zo::run_fake_quant(kernel, job, zo::itemsize(dtype), threads);
  return {ends.low, ends.high};
}

// dst = src + scale * z, quantised, or with lows and highs the ends of its groups beside it;
// returns those of all.
std::pair<float, float> perturb_quant(const std::string& isa, uint64_t dst, uint64_t src,
                                      uint64_t groups, uint64_t group, uint64_t offset,
                                      uint32_t stream, uint32_t direction, double scale,
                                      uint64_t seed, int dtype, int distribution,
                                      const Format& format, uint64_t lows, uint64_t highs,
                                      int threads) {
  const zo::QuantJob quant = quant_job(lows ? 0 : dst, dst, groups, group, format, 0, lows, highs);
  const zo::QuantKernel kernel = quant_kernel(isa, dtype, format);
  Job job = job_of(dst, groups * group, offset, seed, stream);
  const float factor = as_floats({scale})[0];
  job.src = reinterpret_cast<const void*>(src);
  job.direction = &direction;
  job.scale = &factor;
  const int itemsize = zo::itemsize(dtype);
  const Task task{distribution_of(isa, distribution).combine[dtype].at[dtype][0], job, itemsize,
                  itemsize};
  const py::gil_scoped_release release;
  const zo::Extremes ends = zo::run_perturb_quant(task, kernel, quant, threads);
  return {ends.low, ends.high};
}

void emit(zo::Kernel kernel, uint64_t dst, uint64_t count, uint64_t offset, uint64_t seed,
          uint32_t direction, uint32_t stream, int threads) {
  Job job = job_of(dst, count, offset, seed, stream);
  job.direction = &direction;
  const py::gil_scoped_release release;
  zo::run({{kernel, job, 0, 4}}, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of zo_kernels; use them through zo_kernels.ops.";
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const zo::Kernels* kernels : zo::available_kernels()) names.emplace_back(kernels->isa);
    return names;
  });
  m.def("combine", &combine, py::arg("isa"), py::arg("dst"), py::arg("src"), py::arg("numel"),
        py::arg("offset"), py::arg("stream"), py::arg("direction"), py::arg("scale"),
        py::arg("src_scale"), py::arg("seed"), py::arg("src_dtype"), py::arg("dst_dtype"),
        py::arg("stochastic"), py::arg("distribution"), py::arg("changes"), py::arg("threads"));
  py::class_<zo::Store, std::shared_ptr<zo::Store>>(m, "Store")
      .def_property_readonly("nbytes", [](const zo::Store& store) {
        size_t bytes = store.pieces.size() * sizeof(zo::Exceptions);
        for (const zo::Exceptions& piece : store.pieces) bytes += piece.bytes();
        return bytes;
      });
  m.def("pair", &pair, py::arg("isa"), py::arg("plus"), py::arg("minus"), py::arg("src"),
        py::arg("numel"), py::arg("offset"), py::arg("stream"), py::arg("direction"),
        py::arg("scale"), py::arg("seed"), py::arg("dtype"), py::arg("distribution"),
        py::arg("threads"));
  m.def("advance", &advance, py::arg("isa"), py::arg("dst"), py::arg("residual"), py::arg("numel"),
        py::arg("offset"), py::arg("stream"), py::arg("direction"), py::arg("scale"),
        py::arg("length"), py::arg("src_scale"), py::arg("seed"), py::arg("dtype"),
        py::arg("stochastic"), py::arg("distribution"), py::arg("changes"), py::arg("threads"));
  m.def("swap", &swap, py::arg("isa"), py::arg("dst"), py::arg("numel"), py::arg("offset"),
        py::arg("stream"), py::arg("direction"), py::arg("held"), py::arg("held_scale"),
        py::arg("scale"), py::arg("keep"), py::arg("src_scale"), py::arg("seed"), py::arg("dtype"),
        py::arg("stochastic"), py::arg("distribution"), py::arg("changes"), py::arg("threads"));
  m.def("fake_quant", &fake_quant, py::arg("isa"), py::arg("dst"), py::arg("src"),
        py::arg("groups"), py::arg("group"), py::arg("dtype"), py::arg("format"), py::arg("scales"),
        py::arg("lows"), py::arg("highs"), py::arg("threads"));
  m.def("perturb_quant", &perturb_quant, py::arg("isa"), py::arg("dst"), py::arg("src"),
        py::arg("groups"), py::arg("group"), py::arg("offset"), py::arg("stream"),
        py::arg("direction"), py::arg("scale"), py::arg("seed"), py::arg("dtype"),
        py::arg("distribution"), py::arg("format"), py::arg("lows"), py::arg("highs"),
        py::arg("threads"));
  const auto def_emitter = [&m](const char* name, auto kernel_of) {
    m.def(
        name,
        [kernel_of](const std::string& isa, uint64_t dst, uint64_t count, uint64_t offset,
                    uint64_t seed, uint32_t direction, uint32_t stream, int threads) {
          emit(kernel_of(isa), dst, count, offset, seed, direction, stream, threads);
        },
        py::arg("isa"), py::arg("dst"), py::arg("count"), py::arg("offset"), py::arg("seed"),
        py::arg("direction"), py::arg("stream"), py::arg("threads"));
  };
  def_emitter("normal", [](const auto& isa) { return distribution_of(isa, zo::NORMAL).emit; });
  def_emitter("rademacher",
              [](const auto& isa) { return distribution_of(isa, zo::RADEMACHER).emit; });
  def_emitter("random_words", [](const auto& isa) { return zo::kernels_named(isa).random_words; });
}
