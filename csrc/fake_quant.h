// Fake quantisation, for one instruction set: the values that a quantised tensor would have. The
// formulas, and what is exact about them, are in zo_kernels/formats.py. Included by isa.cpp after a
// SIMD wrapper.
//
// A job's groups are taken in blocks that stay in the first-level cache: the ends of all of a
// block's groups, then all their grids, several in a vector, then all their elements. So no group
// waits for its own reduction and divisions, and memory is read and written once.
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

// NF4's midpoints between levels as a search tree (simd_scalar.h, Tree), with half of the distance
// to the next binary32 above each, and how far a doubling of the scale moves the entries of a tree
// of midpoints, and the outcomes, that are patterns of a 16-bit type (see Nf4Patterns).
struct Nf4Tree {
  float midpoint[16], half_ulp[16];
  int16_t tree_step[16], outcome_step[16];
  constexpr Nf4Tree() : midpoint(), half_ulp(), tree_step(), outcome_step() {
    for (int depth = 0; depth < 4; ++depth) {
      for (int i = 0; i < 1 << depth; ++i) {
        const float m = zo::NF4_MIDPOINTS[((2 * i + 1) << (3 - depth)) - 1];
        const int place = (1 << depth) + i;
        float binade = 1.0f;
        while (binade > (m < 0 ? -m : m)) binade *= 0.5f;
        midpoint[place] = m;
        half_ulp[place] = binade * 0x1p-24f;
        tree_step[place] = m < 0 ? -1 : 1;
      }
    }
    for (int i = 0; i < 16; ++i) outcome_step[i] = zo::NF4_LEVELS[i] == 0 ? 0 : 1;
  }
};
constexpr Nf4Tree NF4;

// NF4 of a group, by divisions.
template <class T>
class Nf4ByDivision {
  using Storage = typename T::storage;

 public:
  void choose(const Grids& grids, size_t g) {
    scale_ = splat(grids.scale[g]);
    divisor_ = splat(grids.divisor[g]);
  }

  ZO_INLINE void operator()(const Storage* from, Storage* to) const {
    VF w[2];
    load_step<T>(from, w);
    for (int j = 0; j < 2; ++j) w[j] = mul(level(div(w[j], divisor_)), scale_);
    store_step<T>(to, w);
  }

 private:
  ZO_INLINE VF level(VF x) const {
    const VI upper_half = above(x, splat(NF4.midpoint[1]));
    VI i = sub(splat(2u), upper_half);
    const VF second =
        from_bits(pick(upper_half, bits(splat(NF4.midpoint[3])), bits(splat(NF4.midpoint[2]))));
    i = sub(add(i, i), above(x, second));
    i = sub(add(i, i), above(x, at(upper_, i)));
    i = sub(add(i, i), above(x, at(leaves_, sub(i, splat(8u)))));
    const VI place = and_(i, splat(7u));
    return from_bits(pick(upper_half, bits(at(positive_, place)), bits(at(negative_, place))));
  }

  Eight upper_ = load_eight(NF4.midpoint), leaves_ = load_eight(NF4.midpoint + 8);
  Eight negative_ = load_eight(zo::NF4_LEVELS), positive_ = load_eight(zo::NF4_LEVELS + 8);
  VF scale_ = splat(0.0f), divisor_ = splat(1.0f);
};

// NF4 of a 16-bit type, elements being compared as integers: for each mantissa of a divisor s in
// [1, 2) the tree of the midpoints times s, and the levels times s, both rounded to the type.
//
// Let m be a midpoint and h half of the distance from m to the next binary32. Then RN(w / s) > m
// where w / s > m + h, and so where w > t = s (m + h): w / s = m + h cannot be, for m + h has 25
// significant bits, and s and w have 11 at most. The entry of the tree is the greatest value of the
// type up to t. Near t that is c = RN(s m) rounded to the type, or the value below c: RN(s m) is
// less than two units of binary32 from t, and both are on the same side of every value but one.
// c - s m is exact where its sign is in doubt (c and s m agree in their upper bits then, and the
// product has 35 bits at most), so the sign of t - c is that of fma(s, h, s m - c).
//
// Of a divisor in another binade all patterns but 0 are more or less by the same number, as long as
// they are those of normal numbers.
template <class T>
struct Nf4Patterns {
  static constexpr int BITS = 23 - T::SHIFT, MANTISSAS = 1 << BITS;
  int16_t tree[MANTISSAS][16];
  int16_t outcomes[MANTISSAS][16];

  static const Nf4Patterns& get() {
    static const Nf4Patterns patterns;
    return patterns;
  }

 private:
  Nf4Patterns() {
    for (int mantissa = 0; mantissa < MANTISSAS; ++mantissa) {
      const VF s = splat(1.0f + static_cast<float>(mantissa) / MANTISSAS);
      for (int i = 0; i < 16; i += W) {
        const VF m = load_f32(NF4.midpoint + i);
        const VF c = T::rounded(mul(m, s));
        const VF gap = fma(s, load_f32(NF4.half_ulp + i), fma(m, s, sub(splat(0.0f), c)));
        const VI ordered = sra<16>(ordered_32(sll<16>(pattern(c))));
        keep(add(ordered, sra<31>(bits(gap))), tree[mantissa] + i);
        keep(pattern(T::rounded(mul(load_f32(zo::NF4_LEVELS + i), s))), outcomes[mantissa] + i);
      }
    }
  }
  static VI pattern(VF exact) {
    const VF both[2] = {exact, exact};
    uint16_t stored[2 * W];
    T::store_exact(stored, both);
    return load_u16(stored);
  }
  static void keep(VI values, int16_t* out) {
    uint16_t both[2 * W];
    const VI low = and_(values, splat(0xFFFFu));
    store_u16(both, low, low);
    std::memcpy(out, both, W * sizeof(int16_t));
  }
};

template <class T>
inline bool has_patterns(float divisor) {  // 0.03 times it is normal, and so is it
  return divisor >= (T::SHIFT == 16 ? 0x1p-120f : 0x1p-8f) && divisor < 0x1p127f;
}

// NF4 of a group whose divisor has them.
template <class T>
class Nf4ByPatterns {
 public:
  explicit Nf4ByPatterns(const Nf4Patterns<T>& patterns) : patterns_(patterns) {}

  // given: the levels' scale is another one than the divisor.
  ZO_INLINE void choose(const Grids& grids, size_t g, bool given) {
    uint32_t divisor;
    std::memcpy(&divisor, &grids.divisor[g], sizeof(divisor));
    const uint32_t mantissa = (divisor >> T::SHIFT) & (Nf4Patterns<T>::MANTISSAS - 1);
    const int move = (static_cast<int>(divisor >> 23) - 127) * Nf4Patterns<T>::MANTISSAS;
    tree_ = make_tree(add_scaled(load_sixteen(patterns_.tree[mantissa]), tree_step_, move));
    const Sixteen own = add_scaled(load_sixteen(patterns_.outcomes[mantissa]), outcome_step_, move);
    outcomes_ = make_outcomes(ZO_RARELY(given) ? levels_times(grids.scale[g]) : own);
  }

  ZO_INLINE void operator()(const uint16_t* from, uint16_t* to) const {
    store_u32(to, at(outcomes_, descend(tree_, ordered_16(load_u32(from)))));
  }

 private:
  static Sixteen levels_times(float scale) {
    uint16_t rounded[16 + 2 * W];
    for (int i = 0; i < 16; i += W) {
      const VF level = mul(load_f32(zo::NF4_LEVELS + i), splat(scale));
      const VF both[2] = {level, level};
      T::store(rounded + i, both);
    }
    int16_t patterns[16];
    std::memcpy(patterns, rounded, sizeof(patterns));
    return load_sixteen(patterns);
  }

  const Nf4Patterns<T>& patterns_;
  const Sixteen tree_step_ = load_sixteen(NF4.tree_step);
  const Sixteen outcome_step_ = load_sixteen(NF4.outcome_step);
  Tree tree_ = make_tree(tree_step_);
  Outcomes outcomes_ = make_outcomes(outcome_step_);
};

template <class T>
inline void quantise_groups_nf4(const QuantJob& job, const Grids& grids, size_t count,
                                const typename T::storage* src, typename T::storage* dst) {
  Nf4ByDivision<T> division;
  const auto by_division = [&](size_t g) {
    division.choose(grids, g);
    each_step<T>(src + g * job.group, dst + g * job.group, job.group, division);
  };
  if constexpr (sizeof(typename T::storage) == 4) {
    for (size_t g = 0; g < count; ++g) by_division(g);
  } else {
    Nf4ByPatterns<T> patterns(Nf4Patterns<T>::get());
    for (size_t g = 0; g < count; ++g) {
      if (ZO_RARELY(!has_patterns<T>(grids.divisor[g]))) {
        by_division(g);
        continue;
      }
      patterns.choose(grids, g, job.scales != nullptr);
      each_step<T>(src + g * job.group, dst + g * job.group, job.group, patterns);
    }
  }
}

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
