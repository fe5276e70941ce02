// Fake quantisation to NF4, whose levels are no arithmetic of numbers but a table.
#pragma once

#include <cstdint>
#include <cstring>

#include "grids.h"

namespace {

// The levels of NF4 and what lies between them, as in zo_kernels/formats.py.
constexpr float NF4_LEVELS[16] = {
    -0x1p+0f,        -0x1.647362p-1f, -0x1.0cd66p-1f,  -0x1.946540p-2f,
    -0x1.23449ap-2f, -0x1.7a6a7ep-3f, -0x1.74f0e2p-4f, 0x0p+0f,
    0x1.45f5fep-4f,  0x1.4995c6p-3f,  0x1.f809bap-3f,  0x1.5a0674p-2f,
    0x1.c3497p-2f,   0x1.200f56p-1f,  0x1.722766p-1f,  0x1p+0f,
};
constexpr float NF4_MIDPOINTS[15] = {
    -0x1.b239bp-1f,  -0x1.38a4ep-1f,  -0x1.d709p-2f,  -0x1.5bd4ecp-2f, -0x1.e079d8p-3f,
    -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f, 0x1.ec90c4p-4f,  0x1.a0cfcp-3f,
    0x1.2b05a8p-2f,  0x1.8ea7f2p-2f,  0x1.00da08p-1f, 0x1.491b5ep-1f,  0x1.b913b4p-1f,
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
        const float m = NF4_MIDPOINTS[((2 * i + 1) << (3 - depth)) - 1];
        const int place = (1 << depth) + i;
        float binade = 1.0f;
        while (binade > (m < 0 ? -m : m)) binade *= 0.5f;
        midpoint[place] = m;
        half_ulp[place] = binade * 0x1p-24f;
        tree_step[place] = m < 0 ? -1 : 1;
      }
    }
    for (int i = 0; i < 16; ++i) outcome_step[i] = NF4_LEVELS[i] == 0 ? 0 : 1;
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
  Eight negative_ = load_eight(NF4_LEVELS), positive_ = load_eight(NF4_LEVELS + 8);
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
        keep(pattern(T::rounded(mul(load_f32(NF4_LEVELS + i), s))), outcomes[mantissa] + i);
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
      const VF level = mul(load_f32(NF4_LEVELS + i), splat(scale));
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

}  // namespace
