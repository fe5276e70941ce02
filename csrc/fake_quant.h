// Fake quantisation, for one instruction set: the values that a quantised tensor would have. The
// formulas, and what is exact about them, are in zo_kernels/formats.py. Included by isa.cpp after a
// SIMD wrapper.
//
// A job's groups are taken in blocks that stay in the first-level cache: the ends of all of a
// block's groups, then all their grids, several in a vector, then all their elements. So no group
// waits for its own reduction and divisions, and memory is read and written once.
#pragma once

#include <cstddef>
#include <cstring>

#include "grids.h"
#include "nf4.h"

namespace {

// Turns weights of a group into levels of its grid, before their scale; NF4 is elsewhere.
//
// The level of w is that of the quotient RN(w / s), and a division takes as long as all the rest.
// Products with RN(1 / s) (1 -+ 2^-22) lie on both sides of the quotient. Where they have the same
// level, so has the quotient; where they have not, w is divided. CLAMP is for grids that end before
// the quotients do by more than roundings.
template <class T, int FORMAT, bool CLAMP>
class Levels {
  using Storage = typename T::storage;

 public:
  Levels(const QuantJob& job, const Grids& grids, size_t g)
      : scale_(splat(grids.scale[g])),
        divisor_(splat(grids.divisor[g])),
        below_(splat(grids.below[g])),
        above_(splat(grids.above[g])),
        top_(splat(job.top)) {
    if constexpr (FORMAT == zo::INT_SYMMETRIC) {
      lowest_ = splat(-job.top);
    } else if constexpr (FORMAT == zo::INT_ASYMMETRIC) {
      lowest_ = splat(grids.lowest[g]);
      top_ = splat(grids.lowest[g] + job.top);
    } else {
      least_exponent_ = splat(static_cast<uint32_t>(job.min_exponent + 127) << 23);
      anchor_ = splat((static_cast<uint32_t>(23 - job.mantissa) << 23) | 0x400000u);
    }
  }

  ZO_INLINE void operator()(const Storage* from, Storage* to) const {
    VF w[2], level[2];
    load_step<T>(from, w);
    VI differ[2];
    for (int j = 0; j < 2; ++j) level[j] = by_products(w[j], differ[j]);
    if (ZO_RARELY(any_bit(or_(differ[0], differ[1]))))
      for (int j = 0; j < 2; ++j) level[j] = by_division(w[j]);
    for (int j = 0; j < 2; ++j) level[j] = mul(level[j], scale_);
    store_step<T>(to, level);
  }

 private:
  ZO_INLINE VF by_products(VF w, VI& differ) const {
    if constexpr (FORMAT == zo::FLOAT) {
      const VF magnitude = magnitude_of(w);
      VF low = mul(magnitude, below_);
      // Between values on both sides of a power of two anchors differ, but both levels are it.
      const VF anchor = anchor_of(low), sum = add(low, anchor);
      differ = xor_(bits(sum), bits(fma(magnitude, above_, anchor)));
      low = sub(sum, anchor);
      return with_sign(CLAMP ? smaller(low, top_) : low, w);
    } else {
      const VF sum = fma(w, below_, splat(MAGIC));
      differ = xor_(bits(sum), bits(fma(w, above_, splat(MAGIC))));
      const VF level = sub(sum, splat(MAGIC));  // +0 for zeros
      return CLAMP ? smaller(larger(level, lowest_), top_) : level;
    }
  }

  ZO_INLINE VF by_division(VF w) const {
    const VF x = div(w, divisor_);
    if constexpr (FORMAT == zo::FLOAT) {
      const VF magnitude = smaller(magnitude_of(x), top_), anchor = anchor_of(magnitude);
      return with_sign(sub(add(magnitude, anchor), anchor), w);
    } else {
      return sub(add(smaller(larger(x, lowest_), top_), splat(MAGIC)), splat(MAGIC));
    }
  }

  static ZO_INLINE VF magnitude_of(VF x) { return from_bits(and_(bits(x), splat(0x7FFFFFFFu))); }
  static ZO_INLINE VF with_sign(VF magnitude, VF w) {
    return from_bits(or_(bits(magnitude), and_(bits(w), splat(0x80000000u))));
  }
  // 1.5 * 2^23 steps of the binade, or of the least one: adding and subtracting them rounds.
  ZO_INLINE VF anchor_of(VF magnitude) const {
    const VI exponent = and_(bits(magnitude), splat(0x7F800000u));
    return from_bits(add(max_s32(exponent, least_exponent_), anchor_));
  }

  VF scale_, divisor_, below_, above_, top_, lowest_;
  VI least_exponent_, anchor_;
};

template <class T, int FORMAT, bool CLAMP>
inline void quantise_groups(const QuantJob& job, const Grids& grids, size_t count,
                            const typename T::storage* src, typename T::storage* dst) {
  for (size_t g = 0; g < count; ++g, src += job.group, dst += job.group)
    each_step<T>(src, dst, job.group, Levels<T, FORMAT, CLAMP>(job, grids, g));
}

template <class T, class GroupEnds>
ZO_INLINE GroupEnds ends_of(const typename T::storage* src, size_t count) {
  GroupEnds ends;
  const size_t whole = count / QUANT_STEP * QUANT_STEP;
  for (size_t i = 0; i < whole; i += QUANT_STEP) ends.add(src + i);
  if (ZO_RARELY(whole != count)) {
    typename T::storage rest[QUANT_STEP] = {};
    std::memcpy(rest, src + whole, (count - whole) * sizeof(rest[0]));
    ends.add(rest);
  }
  return ends;
}

template <class T, int FORMAT>
zo::Extremes fake_quant(const QuantJob& job) {
  using Storage = typename T::storage;
  using GroupEnds = Ends<T, FORMAT != zo::INT_ASYMMETRIC>;
  const Storage* src = static_cast<const Storage*>(job.src);
  Storage* dst = static_cast<Storage*>(job.dst);
  Grids grids = {};
  Storage lows[QUANT_GROUPS] = {}, highs[QUANT_GROUPS] = {};
  GroupEnds all;
  size_t block = QUANT_BLOCK / job.group;
  block = block < 1 ? 1 : (block > QUANT_GROUPS ? QUANT_GROUPS : block);
  for (size_t first = 0; first < job.groups; first += block) {
    const size_t count = job.groups - first < block ? job.groups - first : block;
    const size_t at = first * job.group;
    if (job.lows && dst) {
      std::memcpy(grids.low, job.lows + first, count * sizeof(float));
      std::memcpy(grids.high, job.highs + first, count * sizeof(float));
    } else {
      for (size_t g = 0; g < count; ++g) {
        const GroupEnds ends = ends_of<T, GroupEnds>(src + at + g * job.group, job.group);
        all.add(ends);
        highs[g] = ends.upper();
        lows[g] = ends.lower();
      }
      for (size_t g = 0; g < count; g += W) {
        store_f32(grids.high + g, T::load(highs + g));
        store_f32(grids.low + g, T::load(lows + g));
      }
    }
    if (dst) {
      make_grids<FORMAT>(job, first, count, grids);
      if constexpr (FORMAT == zo::NF4)
        quantise_groups_nf4<T>(job, grids, count, src + at, dst + at);
      else if (FORMAT == zo::INT_ASYMMETRIC || job.power_of_two || job.scales)
        quantise_groups<T, FORMAT, true>(job, grids, count, src + at, dst + at);
      else
        quantise_groups<T, FORMAT, false>(job, grids, count, src + at, dst + at);
    } else if (job.lows) {
      std::memcpy(job.lows + first, grids.low, count * sizeof(float));
      std::memcpy(job.highs + first, grids.high, count * sizeof(float));
    }
  }
  const Storage ends[2 * W] = {all.lower(), all.upper()};
  float values[W < 2 ? 2 : W];
  for (size_t i = 0; i < 2; i += W) store_f32(values + i, T::load(ends + i));
  return {values[0], values[1]};
}

}  // namespace
