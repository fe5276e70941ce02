// The only file that knows Python. Addresses, lengths and scalars come in, checked by
// zo_kernels/ops.py; torch is not needed to build or load this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
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
  if (src_dtype < 0 || src_dtype >= zo::DTYPES || dst_dtype < 0 || dst_dtype >= zo::DTYPES)
    throw std::invalid_argument("combine: unknown dtype code");
  const zo::Kernel kernel =
      distribution_of(isa, distribution).combine[src_dtype].at[dst_dtype][stochastic ? 1 : 0];
  const std::vector<float> factors = as_floats(scale);
  const float src_factor = as_floats({src_scale})[0];
  std::vector<Task> tasks;
  tasks.reserve(tensors);
  for (size_t t = 0; t < tensors; ++t) {
    const Job job = {reinterpret_cast<const void*>(src[t]),
                     reinterpret_cast<void*>(dst[t]),
                     offset[t],
                     offset[t] + numel[t],
                     seed,
                     stream[t],
                     static_cast<int>(direction.size()),
                     direction.data(),
                     factors.data() + t * direction.size(),
                     src_factor,
                     changes.empty() ? nullptr : reinterpret_cast<double*>(changes[t])};
    tasks.push_back({kernel, job, zo::itemsize(src_dtype), zo::itemsize(dst_dtype)});
  }
  const py::gil_scoped_release release;
  zo::run(tasks, threads);
}

void emit(zo::Kernel kernel, uint64_t dst, uint64_t count, uint64_t offset, uint64_t seed,
          uint32_t direction, uint32_t stream, int threads) {
  const Job job = {nullptr, reinterpret_cast<void*>(dst),
                   offset,  offset + count,
                   seed,    stream,
                   1,       &direction,
                   nullptr, 1.0f,
                   nullptr};
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
