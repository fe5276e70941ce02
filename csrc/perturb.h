// The primitive, for one instruction set:
//
//   dst = round(src_scale * src + sum_k scales[k] * z_k)
//
// per element: acc = src_scale * float32(src); acc = fma(scales[k], z_k, acc) for k in order, in
// binary32; one rounding to dst's type at the end. Included by isa.cpp after a SIMD wrapper.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "changes.h"
#include "directions.h"
#include "dispatch.h"
#include "noise.h"

namespace {

// The types in memory. Stores take two vectors at a time: some processors pack 16-bit halves of two
// registers as fast as of one; store_exact is for values that the type has. SHIFT is log2 of the
// spacing of its values in binary32 patterns, SMALLEST_NORMAL the smallest with that spacing.
struct F32 {
  using storage = float;
  static constexpr int SHIFT = 0;
  static constexpr uint32_t SMALLEST_NORMAL = 0x00800000u;
  static VF load(const float* p) { return load_f32(p); }
  static void store(float* p, const VF v[2]) {
    store_f32(p, v[0]);
    store_f32(p + W, v[1]);
  }
  static void store_stochastic(float* p, const VF v[2], const VI*) { store(p, v); }
  static void store_exact(float* p, const VF v[2]) { store(p, v); }
  static VF rounded(VF v) { return v; }
  static VF rounded_stochastic(VF v, VI) { return v; }
};

struct BF16 {
  using storage = uint16_t;
  static constexpr int SHIFT = 16;
  static constexpr uint32_t SMALLEST_NORMAL = 0x00800000u;
  static VF load(const uint16_t* p) { return from_bits(sll<16>(load_u16(p))); }
  // Patterns whose upper halves are the rounded values.
  static VI nearest_pattern(VF v) {  // ties to even
    const VI x = bits(v);
    const VI rounded = add(x, add(and_(srl<16>(x), splat(1u)), splat(0x7FFFu)));
    return select_nan(v, splat(0x7FC00000u), rounded);
  }
  static VI stochastic_pattern(VF v, VI random) {
    return select_nan(v, splat(0x7FC00000u), add(bits(v), random));
  }
  static void store(uint16_t* p, const VF v[2]) {
#if defined(ZO_BF16_HARDWARE)
    if (store_bf16_hardware(p, v[0], v[1])) return;
#endif
    store_u16(p, srl<16>(nearest_pattern(v[0])), srl<16>(nearest_pattern(v[1])));
  }
  static void store_stochastic(uint16_t* p, const VF v[2], const VI random[2]) {
    store_u16(p, srl<16>(stochastic_pattern(v[0], random[0])),
              srl<16>(stochastic_pattern(v[1], random[1])));
  }
  static void store_exact(uint16_t* p, const VF v[2]) {
    store_u16(p, srl<16>(bits(v[0])), srl<16>(bits(v[1])));
  }
  static VF rounded(VF v) { return from_bits(and_(nearest_pattern(v), splat(0xFFFF0000u))); }
  static VF rounded_stochastic(VF v, VI random) {
    return from_bits(and_(stochastic_pattern(v, random), splat(0xFFFF0000u)));
  }
};

struct F16 {
  using storage = uint16_t;
  static constexpr int SHIFT = 13;
  static constexpr uint32_t SMALLEST_NORMAL = 0x38800000u;
  static VF load(const uint16_t* p) { return load_f16(p); }
  // The top 13 rounding bits decide over the 13 bits that binary16 drops; below its normal range
  // (2^-14), where more bits are dropped, to nearest.
  static VF stochastic(VF v, VI random) {
    const VI x = bits(v);
    const VI dithered = and_(add(x, srl<3>(random)), splat(0xFFFFE000u));
    const VI magnitude = and_(x, splat(0x7FFFFFFFu));
    const VI chosen = select_less(magnitude, splat(0x38800000u), x, dithered);
    return from_bits(select_nan(v, x, chosen));
  }
  static void store(uint16_t* p, const VF v[2]) {
    store_f16(p, v[0]);
    store_f16(p + W, v[1]);
  }
  static void store_stochastic(uint16_t* p, const VF v[2], const VI random[2]) {
    store_f16(p, stochastic(v[0], random[0]));
    store_f16(p + W, stochastic(v[1], random[1]));
  }
  static void store_exact(uint16_t* p, const VF v[2]) { store(p, v); }
  static VF rounded(VF v) { return round_f16(v); }
  static VF rounded_stochastic(VF v, VI random) { return round_f16(stochastic(v, random)); }
};

// Walks [job.begin, job.end), element indices of the full parameter, in passes of STRIDE aligned
// in that index; ragged ends go through a buffer, so no kernel reads or writes outside the range.
template <int STRIDE, class Body>
inline void walk(const Job& job, const Body& body) {
  const uint64_t first = job.begin / STRIDE * STRIDE;
  for (uint64_t at = first; at < job.end; at += STRIDE) {
    const uint64_t low = at < job.begin ? job.begin : at;
    const uint64_t high = job.end < at + STRIDE ? job.end : at + STRIDE;
    body(at, static_cast<size_t>(low - at), static_cast<size_t>(high - low));
  }
}

// Zeros outside of [skip, skip + count) of a pass.
template <class T, size_t STRIDE>
inline void clear_outside(T (&values)[STRIDE], size_t skip, size_t count) {
  std::memset(values, 0, skip * sizeof(T));
  std::memset(values + skip + count, 0, (STRIDE - skip - count) * sizeof(T));
}

template <class Src, int VECTORS>
inline void load_scaled(VF src_scale, const typename Src::storage* src, VF (&acc)[VECTORS]) {
  for (int j = 0; j < VECTORS; ++j) acc[j] = mul(src_scale, Src::load(src + j * W));
}

template <int VECTORS>
inline void add_scaled(VF scale, const VF (&z)[VECTORS], VF (&acc)[VECTORS]) {
  for (int j = 0; j < VECTORS; ++j) acc[j] = fma(scale, z[j], acc[j]);
}

// One pass before rounding, of several directions. Out of line, for most jobs have one.
template <class Src, class Directions, bool BITS>
__attribute__((noinline)) void accumulate(const Job& job, Directions& directions,
                                          const typename Src::storage* src, VF* out, VI* random) {
  constexpr int VECTORS = Directions::VECTORS, STEP = W * VECTORS;
  const int last = job.directions - 1;
  for (int k = 0; k <= last; ++k) {
    directions.choose(k);
    for (size_t from = 0; from < Directions::STRIDE; from += STEP) {
      VF acc[VECTORS], z[VECTORS], *kept = out + from / W;
      directions.template draw<BITS>(k == last, from, z, random + from / W);
      if (k == 0)
        load_scaled<Src>(splat(job.src_scale), src + from, acc);
      else
        for (int j = 0; j < VECTORS; ++j) acc[j] = kept[j];
      add_scaled(splat(job.scale[k]), z, acc);
      for (int j = 0; j < VECTORS; ++j) kept[j] = acc[j];
    }
  }
}

template <class Src, class Dst, class Directions, bool STOCHASTIC>
void combine(const Job& job) {
  using SrcT = typename Src::storage;
  using DstT = typename Dst::storage;
  constexpr int VECTORS = Directions::VECTORS, STRIDE = Directions::STRIDE;
  Directions directions(job);
  const bool several = job.directions > 1;
  const VF src_scale = splat(job.src_scale), scale = splat(job.scale[0]);
  const bool measured = job.changes != nullptr;
  VF accumulators[STRIDE / W];
  VI randoms[STRIDE / W];
  float before_rounding[STRIDE];
  Totals totals;

  const auto pass = [&](const SrcT* src, DstT* dst, uint64_t at) {
    directions.go_to(at);
    if (ZO_RARELY(several))
      accumulate<Src, Directions, STOCHASTIC>(job, directions, src, accumulators, randoms);
    for (size_t from = 0; from < STRIDE; from += W * VECTORS) {
      VF acc[VECTORS], z[VECTORS];
      VI random[VECTORS];
      if (ZO_RARELY(several)) {
        for (int j = 0; j < VECTORS; ++j) {
          acc[j] = accumulators[from / W + j];
          if (STOCHASTIC) random[j] = randoms[from / W + j];
        }
      } else {
        directions.template draw<STOCHASTIC>(true, from, z, random);
        load_scaled<Src>(src_scale, src + from, acc);
        add_scaled(scale, z, acc);
      }
      for (int j = 0; j < VECTORS; j += 2) {
        if (STOCHASTIC)
          Dst::store_stochastic(dst + from + j * W, acc + j, random + j);
        else
          Dst::store(dst + from + j * W, acc + j);
      }
      if (ZO_RARELY(measured))
        for (int j = 0; j < VECTORS; ++j) store_f32(before_rounding + from + j * W, acc[j]);
    }
  };
  const SrcT* src = static_cast<const SrcT*>(job.src);
  DstT* dst = static_cast<DstT*>(job.dst);
  walk<STRIDE>(job, [&](uint64_t at, size_t skip, size_t count) {
    SrcT in[STRIDE];
    DstT out[STRIDE];
    const bool ragged = count != STRIDE;
    if (ragged) {
      std::memset(in, 0, sizeof(in));
      std::memcpy(in + skip, src, count * sizeof(SrcT));
    } else if (ZO_RARELY(measured)) {
      std::memcpy(in, src, sizeof(in));  // the old values
    }
    pass(ragged ? in : src, ragged ? out : dst, at);
    if (ragged) std::memcpy(dst, out + skip, count * sizeof(DstT));
    if (ZO_RARELY(measured)) {
      if (ragged) {
        clear_outside(out, skip, count);
        clear_outside(before_rounding, skip, count);
      }
      add_changes<Src, Dst>(in, ragged ? out : dst, before_rounding, STRIDE, totals);
    }
    src += count;
    dst += count;
  });
  if (measured) totals.write(job.changes);
}

// float32 z of the range, for looking at and testing.
template <class Directions>
void emit(const Job& job) {
  constexpr int VECTORS = Directions::VECTORS, STRIDE = Directions::STRIDE;
  Directions directions(job);
  float* dst = static_cast<float*>(job.dst);
  walk<STRIDE>(job, [&](uint64_t at, size_t skip, size_t count) {
    float out[STRIDE];
    directions.go_to(at);
    for (size_t from = 0; from < STRIDE; from += W * VECTORS) {
      VF z[VECTORS];
      directions.template draw<false>(false, from, z, nullptr);
      for (int j = 0; j < VECTORS; ++j) store_f32(out + from + j * W, z[j]);
    }
    std::memcpy(dst, out + skip, count * sizeof(float));
    dst += count;
  });
}

// Philox words of the range, word index % 4 of block index / 4, as uint32.
void random_words(const Job& job) {
  constexpr int STRIDE = 4 * W;
  const Keys keys = make_keys(job.seed);
  const Prologue prologue = make_prologue(keys, static_cast<uint32_t>((job.begin / 4) >> 32),
                                          job.stream, job.direction[0]);
  uint32_t* dst = static_cast<uint32_t*>(job.dst);
  walk<STRIDE>(job, [&](uint64_t at, size_t skip, size_t count) {
    uint32_t out[STRIDE];
    VI words[4];
    philox(static_cast<uint32_t>(at / 4), prologue, keys, words);
    transpose_bits(words);
    for (int k = 0; k < 4; ++k) store_u32(out + k * W, words[k]);
    std::memcpy(dst, out + skip, count * sizeof(uint32_t));
    dst += count;
  });
}

}  // namespace
