// Many updates in one read and one write of the weights:
//
//   for each update: theta = round(src_scale * theta + sum_k scales[k] * z_k)
//
// A chunk of the weights stays in the first-level cache as binary32 while every direction passes
// over it; its values are rounded as the weights ask after each update.
#pragma once

#include "perturb.h"

namespace {

enum class Rounding { NEAREST, STOCHASTIC, RESIDUAL };

// Eight bits more for a 16-bit weight: its value has the pattern bits(weight) + residual * 2^SHIFT.
// Where the weight is infinite or NaN, or the value is below 2^-14 in binary16, there are none.
template <class T>
struct WithResidual;

template <>
struct WithResidual<BF16> {
  static constexpr int SHIFT = 8;  // log2 of a value's spacing in patterns, and of a weight's:
  static constexpr int WEIGHT_SHIFT = 16;
  static constexpr uint32_t SMALLEST = 0;  // magnitude that can have a residual
};

template <>
struct WithResidual<F16> {
  static constexpr int SHIFT = 5, WEIGHT_SHIFT = 13;
  static constexpr uint32_t SMALLEST = 0x38800000u;
};

template <class T>
inline VF join(VF weight, VI residual) {
  const VI joined = add(bits(weight), sll<WithResidual<T>::SHIFT>(residual));
  const VI magnitude = and_(bits(weight), splat(0x7FFFFFFFu));
  return from_bits(select_less(magnitude, splat(0x7F800000u), joined, bits(weight)));
}

// `yes` where a value that rounds to the weight `plain` can have a residual, else `no`.
template <class T>
inline VI select_joined(VF value, VF plain, VI yes, VI no) {
  const VI mask = splat(0x7FFFFFFFu);
  const VI finite = select_less(and_(bits(plain), mask), splat(0x7F800000u), yes, no);
  const VI magnitude = and_(bits(value), mask);
  return select_less(magnitude, splat(WithResidual<T>::SMALLEST), no, finite);
}

// To the nearest value that a weight with its residual can have, ties to even.
template <class T>
inline VF round_joined(VF value) {
  constexpr int SHIFT = WithResidual<T>::SHIFT;
  const VI x = bits(value);
  const VI half = add(and_(srl<SHIFT>(x), splat(1u)), splat((1u << (SHIFT - 1)) - 1));
  const VI joined = sll<SHIFT>(srl<SHIFT>(add(x, half)));
  const VF plain = T::rounded(value);
  return from_bits(select_joined<T>(value, plain, joined, bits(plain)));
}

// The weight, half away from zero, and the residual of such a value.
template <class T>
inline VF split(VF value, VI& residual) {
  constexpr int DROPPED = WithResidual<T>::WEIGHT_SHIFT;
  const VI up = add(bits(value), splat(1u << (DROPPED - 1)));
  const VI near = sll<DROPPED>(srl<DROPPED>(up));
  const VF weight = T::rounded(from_bits(near));
  const VI rest = sra<WithResidual<T>::SHIFT>(sub(bits(value), near));
  residual = select_joined<T>(value, weight, rest, splat(0u));
  return from_bits(select_joined<T>(value, weight, bits(weight), bits(T::rounded(value))));
}

template <class T, class Directions, Rounding ROUNDING>
void advance(const Job& job) {
  using Storage = typename T::storage;
  constexpr bool JOINED = ROUNDING == Rounding::RESIDUAL;
  constexpr bool STOCHASTIC = ROUNDING == Rounding::STOCHASTIC;
  constexpr int VECTORS = Directions::VECTORS, STRIDE = Directions::STRIDE, CHUNK = 4096;
  static_assert(CHUNK % STRIDE == 0, "a chunk is whole passes");
  Directions directions(job);
  Totals totals;
  Storage* weights = static_cast<Storage*>(job.dst);
  int8_t* residuals = static_cast<int8_t*>(job.other);
  const bool measured = job.changes != nullptr;

  walk<CHUNK>(job, [&](uint64_t at, size_t skip, size_t count) {
    Storage in[CHUNK];
    float value[CHUNK], before_rounding[CHUNK], old[CHUNK];
    const size_t first = skip / STRIDE * STRIDE;
    const size_t end = (skip + count + STRIDE - 1) / STRIDE * STRIDE;
    if (count != CHUNK) std::memset(in, 0, sizeof(in));
    std::memcpy(in + skip, weights, count * sizeof(Storage));
    for (size_t i = first; i < end; i += W) store_f32(value + i, T::load(in + i));
    if constexpr (JOINED) {
      uint32_t wide[CHUNK];
      if (count != CHUNK) std::memset(wide, 0, sizeof(wide));
      for (size_t i = 0; i < count; ++i)
        wide[skip + i] = static_cast<uint32_t>(static_cast<int32_t>(residuals[i]));
      for (size_t i = first; i < end; i += W)
        store_f32(value + i, join<T>(load_f32(value + i), load_u32(wide + i)));
    }
    if (measured) std::memcpy(old, value, sizeof(old));

    int k = 0;
    for (int u = 0; u < job.updates; ++u) {
      const VF src_scale = splat(job.src_scales[u]);
      const bool final_update = u == job.updates - 1;
      for (int n = 0; n < job.lengths[u]; ++n, ++k) {
        const bool last = n == job.lengths[u] - 1;
        directions.go_to(at + first);
        directions.choose(k);
        if (STOCHASTIC && last) directions.round_by(k);
        const VF scale = splat(job.scale[k]);
        for (size_t pass = first; pass < end; pass += STRIDE) {
          directions.go_to(at + pass);
          for (size_t from = 0; from < STRIDE; from += W * VECTORS) {
            VF acc[VECTORS], z[VECTORS];
            VI random[VECTORS];
            directions.template draw<STOCHASTIC>(last, from, z, random);
            float* here = value + pass + from;
            for (int j = 0; j < VECTORS; ++j) {
              acc[j] = load_f32(here + j * W);
              if (n == 0) acc[j] = mul(src_scale, acc[j]);
              acc[j] = fma(scale, z[j], acc[j]);
              if (last) {
                if (ZO_RARELY(measured && final_update))
                  store_f32(before_rounding + pass + from + j * W, acc[j]);
                if constexpr (STOCHASTIC)
                  acc[j] = T::rounded_stochastic(acc[j], random[j]);
                else if constexpr (JOINED)
                  acc[j] = round_joined<T>(acc[j]);
                else
                  acc[j] = T::rounded(acc[j]);
              }
              store_f32(here + j * W, acc[j]);
            }
          }
        }
      }
    }

    if (measured) {
      if (count != CHUNK) {
        clear_outside(value, skip, count);
        clear_outside(before_rounding, skip, count);
        clear_outside(old, skip, count);
      }
      add_changes<F32, F32>(old, value, before_rounding, CHUNK, totals);
    }
    uint32_t rests[CHUNK];
    for (size_t i = first; i < end; i += 2 * W) {
      VF v[2] = {load_f32(value + i), load_f32(value + i + W)};
      if constexpr (JOINED) {
        for (int j = 0; j < 2; ++j) {
          VI rest;
          v[j] = split<T>(v[j], rest);
          store_u32(rests + i + j * W, rest);
        }
      }
      T::store_exact(in + i, v);
    }
    std::memcpy(weights, in + skip, count * sizeof(Storage));
    weights += count;
    if constexpr (JOINED) {
      for (size_t i = 0; i < count; ++i) residuals[i] = static_cast<int8_t>(rests[skip + i]);
      residuals += count;
    }
  });
  if (measured) totals.write(job.changes);
}

}  // namespace
