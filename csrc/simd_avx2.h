// SIMD wrapper, AVX2 + FMA + F16C: 8 lanes. Names as in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd_x86.h"

namespace {

constexpr int W = 8;
using VF = __m256;
using VI = __m256i;
// Even and odd 32-bit lanes, each in the low half of a 64-bit lane; vpmuludq ignores the rest.
struct Wide {
  __m256i even, odd;
};
// Broadcast in memory, so that the xor takes it as its operand.
struct WideKey {
  __m256i lanes;
};

inline VF splat(float x) { return _mm256_set1_ps(x); }
inline VI splat(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VI add(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI sub(VI a, VI b) { return _mm256_sub_epi32(a, b); }
inline VI and_(VI a, VI b) { return _mm256_and_si256(a, b); }
inline VI or_(VI a, VI b) { return _mm256_or_si256(a, b); }
template <int N>
inline VI sll(VI a) {
  return _mm256_slli_epi32(a, N);
}
template <int N>
inline VI srl(VI a) {
  return _mm256_srli_epi32(a, N);
}
template <int N>
inline VI sra(VI a) {
  return _mm256_srai_epi32(a, N);
}
inline VI sll_each(VI a, VI n) { return _mm256_sllv_epi32(a, n); }
inline VI lanes_mod_8() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline VI load_words_of_8(const uint32_t* p) { return splat(*p); }
inline VF to_float(VI a) { return _mm256_cvtepi32_ps(a); }
inline VI bits(VF a) { return _mm256_castps_si256(a); }
inline VF from_bits(VI a) { return _mm256_castsi256_ps(a); }
inline VF flip_sign(VF a, VI b) { return _mm256_xor_ps(a, from_bits(and_(b, splat(0x80000000u)))); }
inline VI select_nan(VF v, VI if_nan, VI otherwise) {
  return _mm256_blendv_epi8(otherwise, if_nan, bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
inline VI select_less(VI a, VI b, VI yes, VI no) {
  return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a));
}

inline VI max_u32(VI a, VI b) { return _mm256_max_epu32(a, b); }
inline VI min_u32(VI a, VI b) { return _mm256_min_epu32(a, b); }
inline VI less(VI a, VI b) { return _mm256_cmpgt_epi32(b, a); }
inline VI equal(VI a, VI b) { return _mm256_cmpeq_epi32(a, b); }
constexpr unsigned ALL_LANES = 0xFF;
inline unsigned mask_of(VI a) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(a)));
}

inline VF div(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF smaller(VF a, VF b) { return _mm256_min_ps(a, b); }
inline VF larger(VF a, VF b) { return _mm256_max_ps(a, b); }
inline VI above(VF a, VF b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline VI xor_(VI a, VI b) { return _mm256_xor_si256(a, b); }
inline VI pick(VI mask, VI yes, VI no) { return _mm256_blendv_epi8(no, yes, mask); }
inline VI max_s32(VI a, VI b) { return _mm256_max_epi32(a, b); }
inline VI min_s32(VI a, VI b) { return _mm256_min_epi32(a, b); }
inline int32_t highest(VI a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}
inline int32_t lowest(VI a) {
  __m128i x = _mm_min_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_min_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return _mm_cvtsi128_si32(_mm_min_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}

inline bool any_bit(VI a) { return !_mm256_testz_si256(a, a); }

inline VI max_s16(VI a, VI b) { return _mm256_max_epi16(a, b); }
inline VI min_s16(VI a, VI b) { return _mm256_min_epi16(a, b); }
inline VI ordered_16(VI a) {
  return _mm256_xor_si256(a, _mm256_srli_epi16(_mm256_srai_epi16(a, 15), 1));
}

struct Eight {
  __m256 values;
};
inline Eight load_eight(const float* p) { return {_mm256_loadu_ps(p)}; }
inline VF at(const Eight& eight, VI place) { return _mm256_permutevar8x32_ps(eight.values, place); }

// Of a table in both halves of a register, bytes 2 i and 2 i + 1 are entry i; of the place of a
// byte vpshufb takes the low four bits, so places may be 8 or 16 more.
inline __m256i entries_at(__m256i table, __m256i place) {
  const __m256i bytes = _mm256_add_epi16(_mm256_mullo_epi16(place, _mm256_set1_epi16(0x0202)),
                                         _mm256_set1_epi16(0x0100));
  return _mm256_shuffle_epi8(table, bytes);
}
struct Tree {
  __m256i root, upper, leaves;
};
inline Tree make_tree(Sixteen entries) {
  const __m256i upper = _mm256_permute4x64_epi64(entries.values, 0x44);
  return {_mm256_shuffle_epi8(upper, _mm256_set1_epi16(0x0302)), upper,
          _mm256_permute4x64_epi64(entries.values, 0xEE)};
}
inline VI descend(const Tree& tree, VI a) {
  __m256i i = _mm256_sub_epi16(_mm256_set1_epi16(2), _mm256_cmpgt_epi16(a, tree.root));
  const auto go = [&](__m256i entries) {
    i = _mm256_sub_epi16(_mm256_add_epi16(i, i), _mm256_cmpgt_epi16(a, entries));
  };
  go(entries_at(tree.upper, i));
  go(entries_at(tree.upper, i));
  go(entries_at(tree.leaves, i));
  return i;
}
struct Outcomes {
  __m256i below, above;
};
inline Outcomes make_outcomes(Sixteen values) {
  return {_mm256_permute4x64_epi64(values.values, 0x44),
          _mm256_permute4x64_epi64(values.values, 0xEE)};
}
inline VI at(const Outcomes& outcomes, VI place) {
  return _mm256_blendv_epi8(entries_at(outcomes.below, place), entries_at(outcomes.above, place),
                            _mm256_cmpgt_epi16(place, _mm256_set1_epi16(23)));
}

// For each mask of 8 lanes, which byte goes where; 0x80 makes a zero.
struct ByteOrders {
  uint8_t compress[256][8], expand[256][8];
  constexpr ByteOrders() : compress(), expand() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        expand[mask][i] = 0x80;
        compress[mask][i] = 0x80;
      }
      for (int i = 0; i < 8; ++i) {
        if (!(mask >> i & 1)) continue;
        expand[mask][i] = static_cast<uint8_t>(count);
        compress[mask][count++] = static_cast<uint8_t>(i);
      }
    }
  }
};
constexpr ByteOrders BYTE_ORDERS;

inline __m128i load_order(const uint8_t* order) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(order));
}
inline void compress_bytes(uint8_t* p, VI a, unsigned mask) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  const __m128i chosen = _mm_shuffle_epi8(bytes, load_order(BYTE_ORDERS.compress[mask]));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), chosen);
}
inline VI expand_bytes(const uint8_t* p, unsigned mask) {
  const __m128i bytes = load_order(p);
  return _mm256_cvtepu8_epi32(_mm_shuffle_epi8(bytes, load_order(BYTE_ORDERS.expand[mask])));
}

// 32-bit lane 4 L + s (s < 4) holds counter base + 2 s + L, so that the in-lane 4x4 transpose of
// the four words gives element order.
inline Wide wide_counters(uint32_t base) {
  const __m256i b = _mm256_set1_epi64x(base);
  return {_mm256_or_si256(b, _mm256_setr_epi64x(0, 4, 1, 5)),
          _mm256_or_si256(b, _mm256_setr_epi64x(2, 6, 3, 7))};
}
inline Wide wide_mul(Wide a, uint32_t m) {
  const __m256i v = _mm256_set1_epi64x(m);
  return {_mm256_mul_epu32(a.even, v), _mm256_mul_epu32(a.odd, v)};
}
inline Wide wide_hi(Wide a) {
  return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)};
}
inline WideKey wide_key(uint64_t k) { return {_mm256_set1_epi64x(static_cast<int64_t>(k))}; }
inline Wide wide_xor(Wide a, const WideKey& b) {
  return {_mm256_xor_si256(a.even, b.lanes), _mm256_xor_si256(a.odd, b.lanes)};
}
inline Wide wide_xor3(Wide a, Wide b, const WideKey& c) {
  return {_mm256_xor_si256(_mm256_xor_si256(b.even, c.lanes), a.even),
          _mm256_xor_si256(_mm256_xor_si256(b.odd, c.lanes), a.odd)};
}
inline VI wide_merge(Wide a) {
  return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA);
}
inline void transpose(VF n[4]) {
  const auto low = [](VF x, VF y) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
  };
  const auto high = [](VF x, VF y) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
  };
  const VF a = _mm256_unpacklo_ps(n[0], n[1]), b = _mm256_unpackhi_ps(n[0], n[1]);
  const VF c = _mm256_unpacklo_ps(n[2], n[3]), d = _mm256_unpackhi_ps(n[2], n[3]);
  n[0] = low(a, c);
  n[1] = high(a, c);
  n[2] = low(b, d);
  n[3] = high(b, d);
}

inline VF load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f32(float* p, VF v) { _mm256_storeu_ps(p, v); }
inline VI load_u16(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_u16(uint16_t* p, VI a, VI b) {
  const __m256i packed = _mm256_packus_epi32(a, b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline VF load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, VF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline VF round_f16(VF v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline VI load_u32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_u32(void* p, VI v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

}  // namespace
