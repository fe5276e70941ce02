// SIMD wrapper, AVX-512 F/BW/DQ/VL: 16 lanes. Names as in simd_scalar.h.
// With ZO_BF16_HARDWARE, bfloat16 rounding uses AVX512-BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd_x86.h"

namespace {

constexpr int W = 16;
using VF = __m512;
using VI = __m512i;
// Even and odd 32-bit lanes, each in the low half of a 64-bit lane; vpmuludq ignores the rest.
struct Wide {
  __m512i even, odd;
};
using WideKey = uint64_t;  // broadcast by the instruction that reads it

inline VF splat(float x) { return _mm512_set1_ps(x); }
inline VI splat(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VI add(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI sub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
inline VI and_(VI a, VI b) { return _mm512_and_si512(a, b); }
inline VI or_(VI a, VI b) { return _mm512_or_si512(a, b); }
template <int N>
inline VI sll(VI a) {
  return _mm512_slli_epi32(a, N);
}
template <int N>
inline VI srl(VI a) {
  return _mm512_srli_epi32(a, N);
}
template <int N>
inline VI sra(VI a) {
  return _mm512_srai_epi32(a, N);
}
inline VI sll_each(VI a, VI n) { return _mm512_sllv_epi32(a, n); }
inline VI lanes_mod_8() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline VI load_words_of_8(const uint32_t* p) {
  return _mm512_mask_set1_epi32(splat(p[0]), 0xFF00, static_cast<int>(p[4]));
}
inline VF to_float(VI a) { return _mm512_cvtepi32_ps(a); }
inline VI bits(VF a) { return _mm512_castps_si512(a); }
inline VF from_bits(VI a) { return _mm512_castsi512_ps(a); }
inline VF flip_sign(VF a, VI b) {  // 0x78: a ^ (b & c)
  return from_bits(_mm512_ternarylogic_epi32(bits(a), b, splat(0x80000000u), 0x78));
}
inline VI select_nan(VF v, VI if_nan, VI otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), if_nan);
}
inline VI select_less(VI a, VI b, VI yes, VI no) {
  return _mm512_mask_mov_epi32(no, _mm512_cmplt_epi32_mask(a, b), yes);
}

inline VI max_u32(VI a, VI b) { return _mm512_max_epu32(a, b); }
inline VI min_u32(VI a, VI b) { return _mm512_min_epu32(a, b); }
inline VI less(VI a, VI b) { return _mm512_movm_epi32(_mm512_cmplt_epi32_mask(a, b)); }
inline VI equal(VI a, VI b) { return _mm512_movm_epi32(_mm512_cmpeq_epi32_mask(a, b)); }
constexpr unsigned ALL_LANES = 0xFFFF;
inline unsigned mask_of(VI a) { return _mm512_movepi32_mask(a); }
inline void compress_bytes(uint8_t* p, VI a, unsigned mask) {
  const __m512i chosen = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(chosen));
}
inline VI expand_bytes(const uint8_t* p, unsigned mask) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_cvtepu8_epi32(bytes));
}

inline VF div(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF smaller(VF a, VF b) { return _mm512_min_ps(a, b); }
inline VF larger(VF a, VF b) { return _mm512_max_ps(a, b); }
inline VI above(VF a, VF b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)); }
inline VI xor_(VI a, VI b) { return _mm512_xor_si512(a, b); }
inline VI pick(VI mask, VI yes, VI no) {
  return _mm512_mask_mov_epi32(no, _mm512_movepi32_mask(mask), yes);
}
inline VI max_s32(VI a, VI b) { return _mm512_max_epi32(a, b); }
inline VI min_s32(VI a, VI b) { return _mm512_min_epi32(a, b); }
inline int32_t highest(VI a) { return _mm512_reduce_max_epi32(a); }
inline int32_t lowest(VI a) { return _mm512_reduce_min_epi32(a); }

inline bool any_bit(VI a) { return _mm512_test_epi32_mask(a, a) != 0; }

inline VI max_s16(VI a, VI b) { return _mm512_max_epi16(a, b); }
inline VI min_s16(VI a, VI b) { return _mm512_min_epi16(a, b); }
inline VI ordered_16(VI a) {
  return _mm512_xor_si512(a, _mm512_srli_epi16(_mm512_srai_epi16(a, 15), 1));
}

struct Eight {
  __m512 values;
};
inline Eight load_eight(const float* p) { return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))}; }
inline VF at(const Eight& eight, VI place) { return _mm512_permutexvar_ps(place, eight.values); }

struct Tree {
  __m512i entries;
};
inline Tree make_tree(Sixteen entries) { return {_mm512_broadcast_i64x4(entries.values)}; }
inline VI descend(const Tree& tree, VI a) {
  __m512i i = _mm512_set1_epi16(1);
  for (int level = 0; level < 4; ++level) {
    const __m512i entries = _mm512_permutexvar_epi16(i, tree.entries);
    i = _mm512_add_epi16(i, i);
    i = _mm512_mask_add_epi16(i, _mm512_cmpgt_epi16_mask(a, entries), i, _mm512_set1_epi16(1));
  }
  return i;
}
struct Outcomes {
  __m512i values;
};
inline Outcomes make_outcomes(Sixteen values) { return {_mm512_broadcast_i64x4(values.values)}; }
inline VI at(const Outcomes& outcomes, VI place) {
  return _mm512_permutexvar_epi16(place, outcomes.values);
}

// 32-bit lane 4 L + s (s < 4) holds counter base + 4 s + L, so that the in-lane 4x4 transpose of
// the four words gives element order.
inline WideKey wide_key(uint64_t k) { return k; }
inline Wide wide_counters(uint32_t base) {
  const __m512i b = _mm512_set1_epi64(base);
  return {_mm512_or_si512(b, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11)),
          _mm512_or_si512(b, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15))};
}
inline Wide wide_mul(Wide a, uint32_t m) {
  const __m512i v = _mm512_set1_epi64(m);
  return {_mm512_mul_epu32(a.even, v), _mm512_mul_epu32(a.odd, v)};
}
inline Wide wide_hi(Wide a) {
  return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)};
}
inline Wide wide_xor(Wide a, WideKey b) {
  const __m512i v = _mm512_set1_epi64(static_cast<int64_t>(b));
  return {_mm512_xor_si512(a.even, v), _mm512_xor_si512(a.odd, v)};
}
inline Wide wide_xor3(Wide a, Wide b, WideKey c) {  // 0x96: a ^ b ^ c
  const __m512i v = _mm512_set1_epi64(static_cast<int64_t>(c));
  return {_mm512_ternarylogic_epi64(a.even, b.even, v, 0x96),
          _mm512_ternarylogic_epi64(a.odd, b.odd, v, 0x96)};
}
inline VI wide_merge(Wide a) {  // odd 32-bit lanes from the low halves of a.odd
  return _mm512_mask_shuffle_epi32(a.even, 0xAAAA, a.odd, _MM_PERM_CCAA);
}
inline void transpose(VF n[4]) {
  const auto low = [](VF x, VF y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](VF x, VF y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const VF a = _mm512_unpacklo_ps(n[0], n[1]), b = _mm512_unpackhi_ps(n[0], n[1]);
  const VF c = _mm512_unpacklo_ps(n[2], n[3]), d = _mm512_unpackhi_ps(n[2], n[3]);
  n[0] = low(a, c);
  n[1] = high(a, c);
  n[2] = low(b, d);
  n[3] = high(b, d);
}

inline VF load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f32(float* p, VF v) { _mm512_storeu_ps(p, v); }
inline VI load_u16(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_u16(uint16_t* p, VI a, VI b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + W), _mm512_cvtepi32_epi16(b));
}
inline VF load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, VF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline VF round_f16(VF v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline VI load_u32(const void* p) { return _mm512_loadu_si512(p); }
inline void store_u32(void* p, VI v) { _mm512_storeu_si512(p, v); }

#if defined(ZO_BF16_HARDWARE)
// vcvtne2ps2bf16 flushes subnormals to zero; such vectors take the integer path instead.
inline bool store_bf16_hardware(uint16_t* p, VF a, VF b) {
  const __m512i exponent = splat(0x7F800000u);
  if ((_mm512_test_epi32_mask(bits(a), exponent) & _mm512_test_epi32_mask(bits(b), exponent)) !=
      0xFFFF)
    return false;
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));  // the second argument comes first
  return true;
}
#endif

}  // namespace
