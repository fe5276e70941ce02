// What fake quantisation has for all formats: the ends of groups, their grids, and steps through
// their elements. Included by fake_quant.h and nf4.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "perturb.h"

namespace {

using zo::QuantJob;

constexpr size_t QUANT_STEP = 2 * W;  // elements of a group at a time
constexpr size_t QUANT_BLOCK = 4096;  // elements, unless one group is longer
constexpr size_t QUANT_GROUPS = 256;  // of a block at most; a multiple of all W
constexpr uint32_t NO_NUMBER = 0x7FC00000u;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: sums with it are integers

// Two vectors of elements; in which order is the type's affair, the same in both functions.
template <class T>
ZO_INLINE void load_step(const typename T::storage* p, VF (&v)[2]) {
  if constexpr (T::SHIFT == 16) {  // even and odd elements
    const VI both = load_u32(p);
    v[0] = from_bits(sll<16>(both));
    v[1] = from_bits(and_(both, splat(0xFFFF0000u)));
  } else {
    v[0] = T::load(p);
    v[1] = T::load(p + W);
  }
}

// The upper half of the pattern of a number, ties to even.
ZO_INLINE VI nearest_bf16(VF v) {
  const VI x = bits(v);
  return add(add(x, splat(0x7FFFu)), and_(srl<16>(x), splat(1u)));
}

template <class T>
ZO_INLINE void store_step(typename T::storage* p, const VF (&v)[2]) {
  if constexpr (T::SHIFT == 16)
    store_u32(p, or_(srl<16>(nearest_bf16(v[0])), and_(nearest_bf16(v[1]), splat(0xFFFF0000u))));
  else
    T::store(p, v);
}

// Patterns of binary32 as integers in the order of their values, -0 below +0; and back.
ZO_INLINE VI ordered_32(VI x) { return xor_(x, srl<1>(sra<31>(x))); }

// The ends of elements as integers in the order of their values: 0 is among the values, and NaN and
// infinity lie beyond all numbers. Of symmetric grids only max|w| counts, which is the upper end.
template <class T, bool SYMMETRIC>
class Ends {
  using Storage = typename T::storage;
  static constexpr bool HALVES = sizeof(Storage) == 2;

 public:
  ZO_INLINE void add(const Storage* p) {
    add_vector(load_u32(p));
    if constexpr (!HALVES) add_vector(load_u32(p + W));
  }
  ZO_INLINE void add(const Ends& others) {
    high_ = larger_of(high_, others.high_);
    if constexpr (!SYMMETRIC) low_ = smaller_of(low_, others.low_);
  }
  // As patterns of the type.
  ZO_INLINE Storage upper() const {
    if constexpr (HALVES)
      return pattern(highest(max_s32(sra<16>(high_), sra<16>(sll<16>(high_)))));
    else
      return pattern(highest(high_));
  }
  ZO_INLINE Storage lower() const {
    if constexpr (SYMMETRIC)
      return 0;
    else if constexpr (HALVES)
      return pattern(lowest(min_s32(sra<16>(low_), sra<16>(sll<16>(low_)))));
    else
      return pattern(lowest(low_));
  }

 private:
  static ZO_INLINE VI larger_of(VI a, VI b) { return HALVES ? max_s16(a, b) : max_s32(a, b); }
  static ZO_INLINE VI smaller_of(VI a, VI b) { return HALVES ? min_s16(a, b) : min_s32(a, b); }
  ZO_INLINE void add_vector(VI x) {
    if constexpr (SYMMETRIC) {
      high_ = larger_of(high_, and_(x, splat(HALVES ? 0x7FFF7FFFu : 0x7FFFFFFFu)));
    } else {
      const VI key = HALVES ? ordered_16(x) : ordered_32(x);
      high_ = larger_of(high_, key);
      low_ = smaller_of(low_, key);
    }
  }
  static ZO_INLINE Storage pattern(int32_t end) {
    const int32_t flipped = SYMMETRIC ? end : end ^ (end < 0 ? (HALVES ? 0x7FFF : 0x7FFFFFFF) : 0);
    Storage value;
    std::memcpy(&value, &flipped, sizeof(value));  // the low bytes
    return value;
  }

  VI low_ = splat(0u), high_ = splat(0u);
};

// The grids of a block's groups; arrays are read and written by whole vectors.
struct Grids {
  float low[QUANT_GROUPS], high[QUANT_GROUPS];       // ends of the groups
  float scale[QUANT_GROUPS], divisor[QUANT_GROUPS];  // of levels, and of weights
  float below[QUANT_GROUPS], above[QUANT_GROUPS];    // what 1 / divisor is between
  float lowest[QUANT_GROUPS];                        // asymmetric: the least level
};

// The power of two that takes the extent into the binade of the top value; at least 2^-127.
ZO_INLINE VF power_of_two_scale(VF extent, VF top) {
  const VI exponents = splat(0x7F800000u), one = splat(0x3F800000u);
  const VI scale = sub(and_(bits(extent), exponents), sub(and_(bits(top), exponents), one));
  return from_bits(pick(less(scale, splat(0x00800000u)), splat(0x00400000u), scale));
}

ZO_INLINE VF nonzero(VF scale) {
  return from_bits(pick(equal(bits(scale), splat(0u)), bits(splat(1.0f)), bits(scale)));
}

template <int FORMAT>
inline void make_grids(const QuantJob& job, size_t first, size_t count, Grids& grids) {
  const VF top = splat(job.top);
  const bool exact = job.power_of_two && !job.scales;  // reciprocals and products
  if (job.scales) std::memcpy(grids.scale, job.scales + first, count * sizeof(float));
  for (size_t g = 0; g < count; g += W) {
    const VF low = load_f32(grids.low + g), high = load_f32(grids.high + g);
    const VF extent = FORMAT == zo::INT_ASYMMETRIC ? sub(high, low) : high;
    const VF own = FORMAT == zo::FLOAT && job.power_of_two ? power_of_two_scale(extent, top)
                                                           : div(extent, top);
    const VF scale = job.scales ? load_f32(grids.scale + g) : own;
    const VF divisor = nonzero(FORMAT == zo::NF4 ? own : scale);
    store_f32(grids.scale + g, scale);
    store_f32(grids.divisor + g, divisor);
    const VF reciprocal = div(splat(1.0f), divisor);
    VF below = reciprocal, above = reciprocal;
    if (!exact) {
      // Products with them are normal, or so small that their level is 0; or NaN and 0.
      const VI usual = and_(::above(divisor, splat(0x1p-100f)), ::above(splat(0x1p100f), divisor));
      below =
          from_bits(pick(usual, bits(mul(reciprocal, splat(1.0f - 0x1p-22f))), splat(NO_NUMBER)));
      above = from_bits(and_(usual, bits(mul(reciprocal, splat(1.0f + 0x1p-22f)))));
    }
    store_f32(grids.below + g, below);
    store_f32(grids.above + g, above);
    if (FORMAT == zo::INT_ASYMMETRIC) {
      const VF zero = smaller(larger(div(sub(splat(0.0f), low), divisor), splat(0.0f)), top);
      store_f32(grids.lowest + g, sub(splat(MAGIC), add(zero, splat(MAGIC))));
    }
  }
}

// The last elements of a group, through a buffer.
template <class T, class Step>
__attribute__((noinline)) void ragged_step(const typename T::storage* src, typename T::storage* dst,
                                           size_t count, const Step& step) {
  typename T::storage in[QUANT_STEP] = {}, out[QUANT_STEP];
  std::memcpy(in, src, count * sizeof(in[0]));
  step(in, out);
  std::memcpy(dst, out, count * sizeof(in[0]));
}

template <class T, class Step>
ZO_INLINE void each_step(const typename T::storage* src, typename T::storage* dst, size_t count,
                         const Step& step) {
  const size_t whole = count / QUANT_STEP * QUANT_STEP;
  for (size_t i = 0; i < whole; i += QUANT_STEP) {
    // The next block comes while this one is computed; past the end a prefetch does nothing.
    __builtin_prefetch(src + i + QUANT_BLOCK, 0);
    __builtin_prefetch(dst + i + QUANT_BLOCK, 1);
    step(src + i, dst + i);
  }
  if (ZO_RARELY(whole != count)) ragged_step<T>(src + whole, dst + whole, count - whole, step);
}

}  // namespace
