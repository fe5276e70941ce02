// SIMD wrapper, NEON (AArch64): 4 lanes. Names as in simd_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

constexpr int W = 4;
using VF = float32x4_t;
using VI = uint32x4_t;
// Lanes 0, 1 and lanes 2, 3, each in the low half of a 64-bit lane.
struct Wide {
  uint64x2_t low, high;
};
using WideKey = uint64_t;

inline VF splat(float x) { return vdupq_n_f32(x); }
inline VI splat(uint32_t x) { return vdupq_n_u32(x); }
inline VF fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
inline VF mul(VF a, VF b) { return vmulq_f32(a, b); }
inline VF add(VF a, VF b) { return vaddq_f32(a, b); }
inline VF sub(VF a, VF b) { return vsubq_f32(a, b); }
inline VI add(VI a, VI b) { return vaddq_u32(a, b); }
inline VI sub(VI a, VI b) { return vsubq_u32(a, b); }
inline VI and_(VI a, VI b) { return vandq_u32(a, b); }
inline VI or_(VI a, VI b) { return vorrq_u32(a, b); }
template <int N>
inline VI sll(VI a) {
  return vshlq_n_u32(a, N);
}
template <int N>
inline VI srl(VI a) {
  return vshrq_n_u32(a, N);
}
template <int N>
inline VI sra(VI a) {
  if constexpr (N == 0)  // which the instruction cannot do
    return a;
  else
    return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), N));
}
inline VI sll_each(VI a, VI n) { return vshlq_u32(a, vreinterpretq_s32_u32(n)); }
inline VI lanes_mod_8() {
  const uint32_t numbers[4] = {0, 1, 2, 3};
  return vld1q_u32(numbers);
}
inline VI load_words_of_8(const uint32_t* p) { return vdupq_n_u32(*p); }
inline VF to_float(VI a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
inline VI bits(VF a) { return vreinterpretq_u32_f32(a); }
inline VF from_bits(VI a) { return vreinterpretq_f32_u32(a); }
inline VF flip_sign(VF a, VI b) {
  return from_bits(veorq_u32(bits(a), and_(b, splat(0x80000000u))));
}
inline VI select_nan(VF v, VI if_nan, VI otherwise) {
  return vbslq_u32(vceqq_f32(v, v), otherwise, if_nan);
}
inline VI select_less(VI a, VI b, VI yes, VI no) { return vbslq_u32(vcltq_u32(a, b), yes, no); }

inline VI max_u32(VI a, VI b) { return vmaxq_u32(a, b); }
inline VI min_u32(VI a, VI b) { return vminq_u32(a, b); }
inline VI less(VI a, VI b) { return vcltq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)); }
inline VI equal(VI a, VI b) { return vceqq_u32(a, b); }
constexpr unsigned ALL_LANES = 0xF;
inline unsigned mask_of(VI a) {
  const int32_t places[4] = {0, 1, 2, 3};
  return vaddvq_u32(vshlq_u32(vshrq_n_u32(a, 31), vld1q_s32(places)));
}
inline void compress_bytes(uint8_t* p, VI a, unsigned mask) {
  uint32_t lanes[4];
  vst1q_u32(lanes, a);
  for (int i = 0; i < 4; ++i)
    if (mask >> i & 1) *p++ = static_cast<uint8_t>(lanes[i]);
}
inline VI expand_bytes(const uint8_t* p, unsigned mask) {
  uint32_t lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = mask >> i & 1 ? *p++ : 0u;
  return vld1q_u32(lanes);
}

inline VF div(VF a, VF b) { return vdivq_f32(a, b); }
inline VF smaller(VF a, VF b) { return vminq_f32(a, b); }
inline VF larger(VF a, VF b) { return vmaxq_f32(a, b); }
inline VI above(VF a, VF b) { return vcgtq_f32(a, b); }
inline VI xor_(VI a, VI b) { return veorq_u32(a, b); }
inline VI pick(VI mask, VI yes, VI no) { return vbslq_u32(mask, yes, no); }
inline int32x4_t as_signed(VI a) { return vreinterpretq_s32_u32(a); }
inline VI max_s32(VI a, VI b) {
  return vreinterpretq_u32_s32(vmaxq_s32(as_signed(a), as_signed(b)));
}
inline VI min_s32(VI a, VI b) {
  return vreinterpretq_u32_s32(vminq_s32(as_signed(a), as_signed(b)));
}
inline int32_t highest(VI a) { return vmaxvq_s32(as_signed(a)); }
inline int32_t lowest(VI a) { return vminvq_s32(as_signed(a)); }

inline bool any_bit(VI a) { return vmaxvq_u32(a) != 0; }

inline int16x8_t as_halves(VI a) { return vreinterpretq_s16_u32(a); }
inline VI max_s16(VI a, VI b) {
  return vreinterpretq_u32_s16(vmaxq_s16(as_halves(a), as_halves(b)));
}
inline VI min_s16(VI a, VI b) {
  return vreinterpretq_u32_s16(vminq_s16(as_halves(a), as_halves(b)));
}
inline VI ordered_16(VI a) {
  const uint16x8_t sign = vreinterpretq_u16_s16(vshrq_n_s16(as_halves(a), 15));
  return veorq_u32(a, vreinterpretq_u32_u16(vshrq_n_u16(sign, 1)));
}

struct Eight {
  uint8x16x2_t values;
};
inline Eight load_eight(const float* p) {
  return {{{vreinterpretq_u8_f32(vld1q_f32(p)), vreinterpretq_u8_f32(vld1q_f32(p + 4))}}};
}
inline VF at(const Eight& eight, VI place) {  // bytes 4 i to 4 i + 3
  const VI bytes = vaddq_u32(vmulq_u32(place, splat(0x04040404u)), splat(0x03020100u));
  return vreinterpretq_f32_u8(vqtbl2q_u8(eight.values, vreinterpretq_u8_u32(bytes)));
}

struct Sixteen {
  int16x8_t low, high;
};
inline Sixteen load_sixteen(const int16_t* p) { return {vld1q_s16(p), vld1q_s16(p + 8)}; }
inline Sixteen add_scaled(Sixteen a, Sixteen b, int c) {
  const int16x8_t factor = vdupq_n_s16(static_cast<int16_t>(c));
  return {vmlaq_s16(a.low, b.low, factor), vmlaq_s16(a.high, b.high, factor)};
}
inline uint8x16x2_t as_table(Sixteen a) {
  return {{vreinterpretq_u8_s16(a.low), vreinterpretq_u8_s16(a.high)}};
}
// Bytes 2 i and 2 i + 1 of a table are entry i.
inline int16x8_t entries_at(uint8x16x2_t table, uint16x8_t place) {
  const uint16x8_t bytes = vaddq_u16(vmulq_u16(place, vdupq_n_u16(0x0202)), vdupq_n_u16(0x0100));
  return vreinterpretq_s16_u8(vqtbl2q_u8(table, vreinterpretq_u8_u16(bytes)));
}
struct Tree {
  uint8x16x2_t entries;
};
inline Tree make_tree(Sixteen entries) { return {as_table(entries)}; }
inline VI descend(const Tree& tree, VI a) {
  uint16x8_t i = vdupq_n_u16(1);
  for (int level = 0; level < 4; ++level)
    i = vsubq_u16(vaddq_u16(i, i), vcgtq_s16(as_halves(a), entries_at(tree.entries, i)));
  return vreinterpretq_u32_u16(i);
}
struct Outcomes {
  uint8x16x2_t values;
};
inline Outcomes make_outcomes(Sixteen values) { return {as_table(values)}; }
inline VI at(const Outcomes& outcomes, VI place) {
  const uint16x8_t i = vsubq_u16(vreinterpretq_u16_u32(place), vdupq_n_u16(16));
  return vreinterpretq_u32_s16(entries_at(outcomes.values, i));
}

inline WideKey wide_key(uint64_t k) { return k; }
inline Wide wide_counters(uint32_t base) {
  const uint64_t low[2] = {0, 1}, high[2] = {2, 3};
  const uint64x2_t b = vdupq_n_u64(base);
  return {vorrq_u64(b, vld1q_u64(low)), vorrq_u64(b, vld1q_u64(high))};
}
inline Wide wide_mul(Wide a, uint32_t m) {
  const uint32x2_t v = vdup_n_u32(m);
  return {vmull_u32(vmovn_u64(a.low), v), vmull_u32(vmovn_u64(a.high), v)};
}
inline Wide wide_hi(Wide a) { return {vshrq_n_u64(a.low, 32), vshrq_n_u64(a.high, 32)}; }
inline Wide wide_xor(Wide a, WideKey b) {
  const uint64x2_t v = vdupq_n_u64(b);
  return {veorq_u64(a.low, v), veorq_u64(a.high, v)};
}
inline Wide wide_xor3(Wide a, Wide b, WideKey c) {
  const uint64x2_t v = vdupq_n_u64(c);
  return {veorq_u64(veorq_u64(a.low, b.low), v), veorq_u64(veorq_u64(a.high, b.high), v)};
}
inline VI wide_merge(Wide a) { return vcombine_u32(vmovn_u64(a.low), vmovn_u64(a.high)); }
inline void transpose(VF n[4]) {
  const auto low = [](VF x, VF y) {
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  };
  const auto high = [](VF x, VF y) {
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  };
  const VF a = vtrn1q_f32(n[0], n[1]), b = vtrn2q_f32(n[0], n[1]);
  const VF c = vtrn1q_f32(n[2], n[3]), d = vtrn2q_f32(n[2], n[3]);
  n[0] = low(a, c);
  n[1] = low(b, d);
  n[2] = high(a, c);
  n[3] = high(b, d);
}

inline VF load_f32(const float* p) { return vld1q_f32(p); }
inline void store_f32(float* p, VF v) { vst1q_f32(p, v); }
inline VI load_u16(const uint16_t* p) { return vmovl_u16(vld1_u16(p)); }
inline void store_u16(uint16_t* p, VI a, VI b) {
  vst1_u16(p, vmovn_u32(a));
  vst1_u16(p + W, vmovn_u32(b));
}
inline VF load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_f16(uint16_t* p, VF v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline VF round_f16(VF v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
inline VI load_u32(const void* p) {
  return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
inline void store_u32(void* p, VI v) {
  vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(v));
}

}  // namespace
