// Both points of a two-point estimate from one z: round(src + scale z) and round(src - scale z).
#pragma once

#include "perturb.h"

namespace {

template <class T, class Directions>
void pair(const Job& job) {
  using Storage = typename T::storage;
  constexpr int VECTORS = Directions::VECTORS, STRIDE = Directions::STRIDE;
  Directions directions(job);
  const VF scale = splat(job.scale[0]), minus_scale = splat(-job.scale[0]);
  const auto pass = [&](const Storage* src, Storage* plus, Storage* minus, uint64_t at) {
    directions.go_to(at);
    for (size_t from = 0; from < STRIDE; from += W * VECTORS) {
      VF z[VECTORS], above[VECTORS], below[VECTORS];
      directions.template draw<false>(false, from, z, nullptr);
      for (int j = 0; j < VECTORS; ++j) {
        const VF w = T::load(src + from + j * W);
        above[j] = fma(scale, z[j], w);
        below[j] = fma(minus_scale, z[j], w);
      }
      for (int j = 0; j < VECTORS; j += 2) {
        T::store(plus + from + j * W, above + j);
        T::store(minus + from + j * W, below + j);
      }
    }
  };
  const Storage* src = static_cast<const Storage*>(job.src);
  Storage* plus = static_cast<Storage*>(job.dst);
  Storage* minus = static_cast<Storage*>(job.other);
  walk<STRIDE>(job, [&](uint64_t at, size_t skip, size_t count) {
    if (count == STRIDE) {
      pass(src, plus, minus, at);
    } else {
      Storage in[STRIDE] = {}, above[STRIDE], below[STRIDE];
      std::memcpy(in + skip, src, count * sizeof(Storage));
      pass(in, above, below, at);
      std::memcpy(plus, above + skip, count * sizeof(Storage));
      std::memcpy(minus, below + skip, count * sizeof(Storage));
    }
    src += count;
    plus += count;
    minus += count;
  });
}

}  // namespace
