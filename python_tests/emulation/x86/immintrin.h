// Emulation of the AVX-512 intrinsics that csrc/simd_avx512.h uses, as loops over arrays, after
// the "Operation" sections of Intel's intrinsics guide. Found before the compiler's own header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

struct __m128i {
  uint8_t b[16];
};
struct __m256i {
  uint16_t h[16];
};
struct __m256 {
  float f[8];
};
struct __m512 {
  float f[16];
};
struct __m512d {
  uint64_t q[8];
};
struct __m512i {
  uint32_t d[16];
};
using __m512bh = __m512i;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

enum { _CMP_UNORD_Q = 3, _CMP_GT_OQ = 30 };
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };
enum _MM_PERM_ENUM { _MM_PERM_CCAA = 0xA0 };

#define ZO_LANES for (int i = 0; i < 16; ++i)
#define ZO_WIDE_LANES for (int i = 0; i < 8; ++i)

namespace emulation {

template <class To, class From>
inline To cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps all bits");
  To r;
  std::memcpy(&r, &x, sizeof(r));
  return r;
}
inline uint64_t wide(const __m512i& a, int i) {
  return a.d[2 * i] | static_cast<uint64_t>(a.d[2 * i + 1]) << 32;
}
inline void set_wide(__m512i& a, int i, uint64_t x) {
  a.d[2 * i] = static_cast<uint32_t>(x);
  a.d[2 * i + 1] = static_cast<uint32_t>(x >> 32);
}

// binary16 by its definition: mantissa * 2^exponent.
inline float half_to_float(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float r;
  if (exponent == 31)
    r = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else if (exponent == 0)
    r = std::ldexp(static_cast<float>(mantissa), -24);
  else
    r = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -r : r;
}
// The nearest multiple of the result's unit, ties to even (the default mode of nearbyint).
inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7E00;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520) return sign | 0x7C00;  // half way to 2^16 and above
  int exponent = -14;
  while (magnitude >= std::ldexp(1.0, exponent + 1)) ++exponent;
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  // A carry out of the mantissa moves into the exponent, as the encoding has it.
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + static_cast<int>(units));
}

}  // namespace emulation

inline __m512 _mm512_set1_ps(float x) {
  __m512 r;
  ZO_LANES r.f[i] = x;
  return r;
}
inline __m512i _mm512_set1_epi32(int x) {
  __m512i r;
  ZO_LANES r.d[i] = static_cast<uint32_t>(x);
  return r;
}
inline __m512i _mm512_set1_epi64(long long x) {
  __m512i r;
  ZO_WIDE_LANES emulation::set_wide(r, i, static_cast<uint64_t>(x));
  return r;
}
inline __m512i _mm512_setr_epi64(long long a, long long b, long long c, long long d, long long e,
                                 long long f, long long g, long long h) {
  const long long x[8] = {a, b, c, d, e, f, g, h};
  __m512i r;
  ZO_WIDE_LANES emulation::set_wide(r, i, static_cast<uint64_t>(x[i]));
  return r;
}
inline __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i,
                                 int j, int k, int l, int m, int n, int o, int p) {
  const int x[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return emulation::cast<__m512i>(x);
}
inline __m512i _mm512_mask_set1_epi32(__m512i src, __mmask16 k, int x) {
  ZO_LANES if (k >> i & 1) src.d[i] = static_cast<uint32_t>(x);
  return src;
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  ZO_LANES c.f[i] = std::fma(a.f[i], b.f[i], c.f[i]);
  return c;
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  ZO_LANES a.f[i] *= b.f[i];
  return a;
}
inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
  ZO_LANES a.f[i] /= b.f[i];
  return a;
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  ZO_LANES a.f[i] += b.f[i];
  return a;
}
// The second operand, where they are equal or one is NaN.
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  ZO_LANES a.f[i] = a.f[i] < b.f[i] ? a.f[i] : b.f[i];
  return a;
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  ZO_LANES a.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i];
  return a;
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  ZO_LANES a.f[i] -= b.f[i];
  return a;
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  ZO_LANES a.d[i] += b.d[i];
  return a;
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  ZO_LANES a.d[i] -= b.d[i];
  return a;
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  ZO_LANES a.d[i] &= b.d[i];
  return a;
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
  ZO_LANES a.d[i] |= b.d[i];
  return a;
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  ZO_LANES a.d[i] = n > 31 ? 0 : a.d[i] << n;
  return a;
}
inline __m512i _mm512_sllv_epi32(__m512i a, __m512i n) {
  ZO_LANES a.d[i] = n.d[i] > 31 ? 0 : a.d[i] << n.d[i];
  return a;
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  ZO_LANES a.d[i] = n > 31 ? 0 : a.d[i] >> n;
  return a;
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) {  // the sign from 31 on
  ZO_LANES {
    const uint32_t sign = a.d[i] >> 31 ? ~0u : 0;
    a.d[i] = n > 31 ? sign : a.d[i] >> n | (n ? sign << (32 - n) : 0);
  }
  return a;
}
inline __m512i _mm512_srli_epi64(__m512i a, unsigned n) {
  ZO_WIDE_LANES emulation::set_wide(a, i, n > 63 ? 0 : emulation::wide(a, i) >> n);
  return a;
}
inline __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  ZO_WIDE_LANES emulation::set_wide(a, i, static_cast<uint64_t>(a.d[2 * i]) * b.d[2 * i]);
  return a;
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
  ZO_LANES a.d[i] ^= b.d[i];
  return a;
}
inline __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  ZO_LANES if (b.d[i] > a.d[i]) a.d[i] = b.d[i];
  return a;
}
inline __m512i _mm512_min_epu32(__m512i a, __m512i b) {
  ZO_LANES if (b.d[i] < a.d[i]) a.d[i] = b.d[i];
  return a;
}
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  ZO_LANES if (static_cast<int32_t>(b.d[i]) > static_cast<int32_t>(a.d[i])) a.d[i] = b.d[i];
  return a;
}
inline __m512i _mm512_min_epi32(__m512i a, __m512i b) {
  ZO_LANES if (static_cast<int32_t>(b.d[i]) < static_cast<int32_t>(a.d[i])) a.d[i] = b.d[i];
  return a;
}
inline int _mm512_reduce_max_epi32(__m512i a) {
  int r = static_cast<int>(a.d[0]);
  ZO_LANES if (static_cast<int>(a.d[i]) > r) r = static_cast<int>(a.d[i]);
  return r;
}
inline int _mm512_reduce_min_epi32(__m512i a) {
  int r = static_cast<int>(a.d[0]);
  ZO_LANES if (static_cast<int>(a.d[i]) < r) r = static_cast<int>(a.d[i]);
  return r;
}

inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  __m512 r;
  ZO_LANES r.f[i] = static_cast<float>(static_cast<int32_t>(a.d[i]));
  return r;
}
inline __m512i _mm512_castps_si512(__m512 a) { return emulation::cast<__m512i>(a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return emulation::cast<__m512>(a); }
inline __m512d _mm512_castps_pd(__m512 a) { return emulation::cast<__m512d>(a); }
inline __m512 _mm512_castpd_ps(__m512d a) { return emulation::cast<__m512>(a); }

// Each result bit is the bit of imm that the three operands' bits number, a the highest.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int imm) {
  __m512i r = {};
  ZO_LANES for (int bit = 0; bit < 32; ++bit) {
    const int at = (a.d[i] >> bit & 1) << 2 | (b.d[i] >> bit & 1) << 1 | (c.d[i] >> bit & 1);
    r.d[i] |= static_cast<uint32_t>(imm >> at & 1) << bit;
  }
  return r;
}
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int imm) {
  return _mm512_ternarylogic_epi32(a, b, c, imm);
}
inline __m512i _mm512_mask_mov_epi32(__m512i src, __mmask16 k, __m512i a) {
  ZO_LANES if (k >> i & 1) src.d[i] = a.d[i];
  return src;
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  __mmask16 k = 0;  // the only predicates here
  ZO_LANES {
    const bool unordered = std::isnan(a.f[i]) || std::isnan(b.f[i]);
    if (predicate == _CMP_UNORD_Q ? unordered : !unordered && a.f[i] > b.f[i]) k |= 1 << i;
  }
  return k;
}
inline __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
  __mmask16 k = 0;
  ZO_LANES if (static_cast<int32_t>(a.d[i]) < static_cast<int32_t>(b.d[i])) k |= 1 << i;
  return k;
}
inline __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  __mmask16 k = 0;
  ZO_LANES if (a.d[i] == b.d[i]) k |= 1 << i;
  return k;
}
inline __m512i _mm512_movm_epi32(__mmask16 k) {
  __m512i r;
  ZO_LANES r.d[i] = k >> i & 1 ? ~0u : 0;
  return r;
}
inline __mmask16 _mm512_movepi32_mask(__m512i a) {
  __mmask16 k = 0;
  ZO_LANES if (a.d[i] >> 31) k |= 1 << i;
  return k;
}
// The lanes of the mask move to the front, zeros follow; and back.
inline __m512i _mm512_maskz_compress_epi32(__mmask16 k, __m512i a) {
  __m512i r = {};
  int m = 0;
  ZO_LANES if (k >> i & 1) r.d[m++] = a.d[i];
  return r;
}
inline __m512i _mm512_maskz_expand_epi32(__mmask16 k, __m512i a) {
  __m512i r = {};
  int m = 0;
  ZO_LANES if (k >> i & 1) r.d[i] = a.d[m++];
  return r;
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  __mmask16 k = 0;
  ZO_LANES if (a.d[i] & b.d[i]) k |= 1 << i;
  return k;
}
// Within each 128 bits: lane j is lane (imm >> 2 j) & 3 of a where the mask is set, else of src.
inline __m512i _mm512_mask_shuffle_epi32(__m512i src, __mmask16 k, __m512i a, _MM_PERM_ENUM imm) {
  ZO_LANES if (k >> i & 1) src.d[i] = a.d[i / 4 * 4 + (imm >> 2 * (i % 4) & 3)];
  return src;
}
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  __m512 r;
  ZO_LANES r.f[i] = (i & 1 ? b : a).f[i / 4 * 4 + i % 4 / 2];
  return r;
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  __m512 r;
  ZO_LANES r.f[i] = (i & 1 ? b : a).f[i / 4 * 4 + 2 + i % 4 / 2];
  return r;
}
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  __m512d r;
  ZO_WIDE_LANES r.q[i] = (i & 1 ? b : a).q[i / 2 * 2];
  return r;
}
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  __m512d r;
  ZO_WIDE_LANES r.q[i] = (i & 1 ? b : a).q[i / 2 * 2 + 1];
  return r;
}

inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline __m128i _mm_loadu_si128(const __m128i* p) {
  __m128i r;
  std::memcpy(&r, static_cast<const void*>(p), sizeof(r));
  return r;
}
inline void _mm_storeu_si128(__m128i* p, __m128i a) {
  std::memcpy(static_cast<void*>(p), &a, sizeof(a));
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  __m512i r;
  ZO_LANES r.d[i] = a.b[i];
  return r;
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {  // the low bytes, no saturation
  __m128i r;
  ZO_LANES r.b[i] = static_cast<uint8_t>(a.d[i]);
  return r;
}
inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i r;
  std::memcpy(&r, static_cast<const void*>(p), sizeof(r));
  return r;
}
inline void _mm256_storeu_si256(__m256i* p, __m256i a) {
  std::memcpy(static_cast<void*>(p), &a, sizeof(a));
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  __m512i r;
  ZO_LANES r.d[i] = a.h[i];
  return r;
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  __m256i r;
  ZO_LANES r.h[i] = static_cast<uint16_t>(a.d[i]);
  return r;
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  __m512 r;
  ZO_LANES r.f[i] = emulation::half_to_float(a.h[i]);
  return r;
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  __m256i r;
  ZO_LANES r.h[i] = emulation::float_to_half(a.f[i]);
  return r;
}
// b in the low half, a in the high one. Subnormal inputs count as zeros; NaN is made quiet; ties go
// to even.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  __m512bh r = {};
  for (int i = 0; i < 32; ++i) {
    const uint32_t x = emulation::cast<uint32_t>(i < 16 ? b.f[i] : a.f[i - 16]);
    const uint32_t exponent = x >> 23 & 255;
    uint32_t half;
    if (exponent == 0)
      half = x >> 31 << 15;
    else if (exponent == 255)
      half = x >> 16 | (x & 0x7FFFFF ? 0x40 : 0);
    else
      half = (x + 0x7FFF + (x >> 16 & 1)) >> 16;
    r.d[i / 2] |= half << 16 * (i % 2);
  }
  return r;
}

#include "halves.h"

#undef ZO_LANES
#undef ZO_WIDE_LANES
