// Emulation of the NEON intrinsics that csrc/simd_neon.h uses, as loops over arrays, after the
// pseudocode of Arm's intrinsics reference. Conversions to and from half share x86/immintrin.h's.
#pragma once

#include "../x86/immintrin.h"

struct float32x4_t {
  float v[4];
};
struct int32x4_t {
  int32_t v[4];
};
struct uint32x4_t {
  uint32_t v[4];
};
struct uint32x2_t {
  uint32_t v[2];
};
struct uint64x2_t {
  uint64_t v[2];
};
struct float64x2_t {
  uint64_t v[2];
};
struct uint16x4_t {
  uint16_t v[4];
};
struct float16x4_t {
  uint16_t v[4];
};
struct int16x8_t {
  int16_t v[8];
};
struct uint16x8_t {
  uint16_t v[8];
};
struct uint8x16_t {
  uint8_t v[16];
};
struct uint8x16x2_t {
  uint8x16_t val[2];
};

#define ZO_LANES for (int i = 0; i < 4; ++i)
#define ZO_PAIR for (int i = 0; i < 2; ++i)

inline float32x4_t vdupq_n_f32(float x) { return {{x, x, x, x}}; }
inline uint32x4_t vdupq_n_u32(uint32_t x) { return {{x, x, x, x}}; }
inline uint32x2_t vdup_n_u32(uint32_t x) { return {{x, x}}; }
inline uint64x2_t vdupq_n_u64(uint64_t x) { return {{x, x}}; }

inline float32x4_t vfmaq_f32(float32x4_t a, float32x4_t b, float32x4_t c) {  // a + b * c
  ZO_LANES a.v[i] = std::fma(b.v[i], c.v[i], a.v[i]);
  return a;
}
inline float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) {
  ZO_LANES a.v[i] *= b.v[i];
  return a;
}
inline float32x4_t vsubq_f32(float32x4_t a, float32x4_t b) {
  ZO_LANES a.v[i] -= b.v[i];
  return a;
}
inline uint32x4_t vaddq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES a.v[i] += b.v[i];
  return a;
}
inline uint32x4_t vsubq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES a.v[i] -= b.v[i];
  return a;
}
inline uint32x4_t vandq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES a.v[i] &= b.v[i];
  return a;
}
inline uint32x4_t vorrq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES a.v[i] |= b.v[i];
  return a;
}
inline uint32x4_t veorq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES a.v[i] ^= b.v[i];
  return a;
}
// Shifts by a number that the instruction holds: to the left from 0 on, to the right from 1 on.
namespace emulation {
template <int N>
inline uint32x4_t shift_left(uint32x4_t a) {
  static_assert(N >= 0 && N < 32, "vshlq_n_u32: a shift by 0 to 31");
  ZO_LANES a.v[i] <<= N;
  return a;
}
template <int N>
inline uint32x4_t shift_right(uint32x4_t a) {
  static_assert(N > 0 && N <= 32, "vshrq_n_u32: a shift by 1 to 32");
  ZO_LANES a.v[i] = N == 32 ? 0 : a.v[i] >> N % 32;
  return a;
}
template <int N>
inline int32x4_t shift_right_signed(int32x4_t a) {
  static_assert(N > 0 && N <= 32, "vshrq_n_s32: a shift by 1 to 32");
  ZO_LANES a.v[i] = static_cast<int32_t>(static_cast<int64_t>(a.v[i]) >> N);
  return a;
}
template <int N>
inline uint64x2_t shift_right(uint64x2_t a) {
  static_assert(N > 0 && N < 64, "vshrq_n_u64: a shift by 1 to 63 (and 64, not used)");
  ZO_PAIR a.v[i] >>= N;
  return a;
}
}  // namespace emulation
#define vshlq_n_u32(a, n) emulation::shift_left<n>(a)
#define vshrq_n_u32(a, n) emulation::shift_right<n>(a)
#define vshrq_n_s32(a, n) emulation::shift_right_signed<n>(a)
#define vshrq_n_u64(a, n) emulation::shift_right<n>(a)
// To the left by the low byte of n, signed; to the right where that is negative.
inline uint32x4_t vshlq_u32(uint32x4_t a, int32x4_t n) {
  ZO_LANES {
    const int by = static_cast<int8_t>(n.v[i]);
    if (by >= 32 || by <= -32)
      a.v[i] = 0;
    else
      a.v[i] = by >= 0 ? a.v[i] << by : a.v[i] >> -by;
  }
  return a;
}
inline uint32x4_t vmaxq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES if (b.v[i] > a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline uint32x4_t vminq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES if (b.v[i] < a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline uint32_t vaddvq_u32(uint32x4_t a) { return a.v[0] + a.v[1] + a.v[2] + a.v[3]; }
inline float32x4_t vcvtq_f32_s32(int32x4_t a) {
  float32x4_t r;
  ZO_LANES r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline int32x4_t vreinterpretq_s32_u32(uint32x4_t a) { return emulation::cast<int32x4_t>(a); }
inline uint32x4_t vreinterpretq_u32_s32(int32x4_t a) { return emulation::cast<uint32x4_t>(a); }
inline uint32x4_t vreinterpretq_u32_f32(float32x4_t a) { return emulation::cast<uint32x4_t>(a); }
inline float32x4_t vreinterpretq_f32_u32(uint32x4_t a) { return emulation::cast<float32x4_t>(a); }
inline float64x2_t vreinterpretq_f64_f32(float32x4_t a) { return emulation::cast<float64x2_t>(a); }
inline float32x4_t vreinterpretq_f32_f64(float64x2_t a) { return emulation::cast<float32x4_t>(a); }
inline float16x4_t vreinterpret_f16_u16(uint16x4_t a) { return emulation::cast<float16x4_t>(a); }
inline uint16x4_t vreinterpret_u16_f16(float16x4_t a) { return emulation::cast<uint16x4_t>(a); }

inline uint32x4_t vceqq_f32(float32x4_t a, float32x4_t b) {
  uint32x4_t r;
  ZO_LANES r.v[i] = a.v[i] == b.v[i] ? ~0u : 0;
  return r;
}
inline uint32x4_t vcltq_u32(uint32x4_t a, uint32x4_t b) {
  uint32x4_t r;
  ZO_LANES r.v[i] = a.v[i] < b.v[i] ? ~0u : 0;
  return r;
}
inline uint32x4_t vcltq_s32(int32x4_t a, int32x4_t b) {
  uint32x4_t r;
  ZO_LANES r.v[i] = a.v[i] < b.v[i] ? ~0u : 0;
  return r;
}
inline uint32x4_t vceqq_u32(uint32x4_t a, uint32x4_t b) {
  uint32x4_t r;
  ZO_LANES r.v[i] = a.v[i] == b.v[i] ? ~0u : 0;
  return r;
}
inline uint32x4_t vbslq_u32(uint32x4_t mask, uint32x4_t yes, uint32x4_t no) {
  ZO_LANES mask.v[i] = (mask.v[i] & yes.v[i]) | (~mask.v[i] & no.v[i]);
  return mask;
}

inline uint64x2_t vorrq_u64(uint64x2_t a, uint64x2_t b) {
  ZO_PAIR a.v[i] |= b.v[i];
  return a;
}
inline uint64x2_t veorq_u64(uint64x2_t a, uint64x2_t b) {
  ZO_PAIR a.v[i] ^= b.v[i];
  return a;
}
inline uint64x2_t vld1q_u64(const uint64_t* p) { return {{p[0], p[1]}}; }
inline uint64x2_t vmull_u32(uint32x2_t a, uint32x2_t b) {
  uint64x2_t r;
  ZO_PAIR r.v[i] = static_cast<uint64_t>(a.v[i]) * b.v[i];
  return r;
}
inline uint32x2_t vmovn_u64(uint64x2_t a) {
  return {{static_cast<uint32_t>(a.v[0]), static_cast<uint32_t>(a.v[1])}};
}
inline uint32x4_t vcombine_u32(uint32x2_t low, uint32x2_t high) {
  return {{low.v[0], low.v[1], high.v[0], high.v[1]}};
}
inline float64x2_t vzip1q_f64(float64x2_t a, float64x2_t b) { return {{a.v[0], b.v[0]}}; }
inline float64x2_t vzip2q_f64(float64x2_t a, float64x2_t b) { return {{a.v[1], b.v[1]}}; }
inline float32x4_t vtrn1q_f32(float32x4_t a, float32x4_t b) {
  return {{a.v[0], b.v[0], a.v[2], b.v[2]}};
}
inline float32x4_t vtrn2q_f32(float32x4_t a, float32x4_t b) {
  return {{a.v[1], b.v[1], a.v[3], b.v[3]}};
}

inline float32x4_t vld1q_f32(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline int32x4_t vld1q_s32(const int32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline uint32x4_t vld1q_u32(const uint32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void vst1q_f32(float* p, float32x4_t a) { std::memcpy(p, &a, sizeof(a)); }
inline void vst1q_u32(uint32_t* p, uint32x4_t a) { std::memcpy(p, &a, sizeof(a)); }
inline uint16x4_t vld1_u16(const uint16_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void vst1_u16(uint16_t* p, uint16x4_t a) { std::memcpy(p, &a, sizeof(a)); }
inline uint32x4_t vmovl_u16(uint16x4_t a) { return {{a.v[0], a.v[1], a.v[2], a.v[3]}}; }
inline uint16x4_t vmovn_u32(uint32x4_t a) {
  uint16x4_t r;
  ZO_LANES r.v[i] = static_cast<uint16_t>(a.v[i]);
  return r;
}
inline float32x4_t vcvt_f32_f16(float16x4_t a) {
  float32x4_t r;
  ZO_LANES r.v[i] = emulation::half_to_float(a.v[i]);
  return r;
}
inline float16x4_t vcvt_f16_f32(float32x4_t a) {
  float16x4_t r;
  ZO_LANES r.v[i] = emulation::float_to_half(a.v[i]);
  return r;
}

// For fake quantisation.
#define ZO_HALVES for (int i = 0; i < 8; ++i)
inline float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) {
  ZO_LANES a.v[i] += b.v[i];
  return a;
}
inline float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) {
  ZO_LANES a.v[i] /= b.v[i];
  return a;
}
inline float32x4_t vminq_f32(float32x4_t a, float32x4_t b) {  // NaN wins
  ZO_LANES a.v[i] = a.v[i] < b.v[i] || std::isnan(a.v[i]) ? a.v[i] : b.v[i];
  return a;
}
inline float32x4_t vmaxq_f32(float32x4_t a, float32x4_t b) {
  ZO_LANES a.v[i] = a.v[i] > b.v[i] || std::isnan(a.v[i]) ? a.v[i] : b.v[i];
  return a;
}
inline uint32x4_t vcgtq_f32(float32x4_t a, float32x4_t b) {
  uint32x4_t r;
  ZO_LANES r.v[i] = a.v[i] > b.v[i] ? ~0u : 0u;
  return r;
}
inline uint32x4_t vmulq_u32(uint32x4_t a, uint32x4_t b) {
  ZO_LANES a.v[i] *= b.v[i];
  return a;
}
inline int32x4_t vmaxq_s32(int32x4_t a, int32x4_t b) {
  ZO_LANES if (b.v[i] > a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline int32x4_t vminq_s32(int32x4_t a, int32x4_t b) {
  ZO_LANES if (b.v[i] < a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline int32_t vmaxvq_s32(int32x4_t a) {
  int32_t r = a.v[0];
  ZO_LANES if (a.v[i] > r) r = a.v[i];
  return r;
}
inline int32_t vminvq_s32(int32x4_t a) {
  int32_t r = a.v[0];
  ZO_LANES if (a.v[i] < r) r = a.v[i];
  return r;
}
inline uint16x8_t vdupq_n_u16(uint16_t x) { return {{x, x, x, x, x, x, x, x}}; }
inline int16x8_t vmaxq_s16(int16x8_t a, int16x8_t b) {
  ZO_HALVES if (b.v[i] > a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline int16x8_t vminq_s16(int16x8_t a, int16x8_t b) {
  ZO_HALVES if (b.v[i] < a.v[i]) a.v[i] = b.v[i];
  return a;
}
inline int16x8_t vdupq_n_s16(int16_t x) { return {{x, x, x, x, x, x, x, x}}; }
inline int16x8_t vmlaq_s16(int16x8_t a, int16x8_t b, int16x8_t c) {  // a + b * c
  ZO_HALVES a.v[i] = static_cast<int16_t>(a.v[i] + b.v[i] * c.v[i]);
  return a;
}
inline int16x8_t vld1q_s16(const int16_t* p) {
  int16x8_t r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline uint32_t vmaxvq_u32(uint32x4_t a) {
  uint32_t r = 0;
  ZO_LANES if (a.v[i] > r) r = a.v[i];
  return r;
}
inline uint16x8_t vcgtq_s16(int16x8_t a, int16x8_t b) {
  uint16x8_t r;
  ZO_HALVES r.v[i] = a.v[i] > b.v[i] ? 0xFFFF : 0;
  return r;
}
inline uint16x8_t vaddq_u16(uint16x8_t a, uint16x8_t b) {
  ZO_HALVES a.v[i] = static_cast<uint16_t>(a.v[i] + b.v[i]);
  return a;
}
inline uint16x8_t vsubq_u16(uint16x8_t a, uint16x8_t b) {
  ZO_HALVES a.v[i] = static_cast<uint16_t>(a.v[i] - b.v[i]);
  return a;
}
inline uint16x8_t vmulq_u16(uint16x8_t a, uint16x8_t b) {
  ZO_HALVES a.v[i] = static_cast<uint16_t>(static_cast<uint32_t>(a.v[i]) * b.v[i]);
  return a;
}
namespace emulation {
template <int N>
inline int16x8_t shift_right_signed(int16x8_t a) {
  static_assert(N > 0 && N <= 16, "vshrq_n_s16: a shift by 1 to 16");
  ZO_HALVES a.v[i] = static_cast<int16_t>(a.v[i] >> N);
  return a;
}
template <int N>
inline uint16x8_t shift_right(uint16x8_t a) {
  static_assert(N > 0 && N <= 16, "vshrq_n_u16: a shift by 1 to 16");
  ZO_HALVES a.v[i] = static_cast<uint16_t>(a.v[i] >> N);
  return a;
}
}  // namespace emulation
#define vshrq_n_s16(a, n) emulation::shift_right_signed<n>(a)
#define vshrq_n_u16(a, n) emulation::shift_right<n>(a)
// The bytes that the index names, of two registers; 0 beyond.
inline uint8x16_t vqtbl2q_u8(uint8x16x2_t table, uint8x16_t index) {
  uint8x16_t r;
  for (int i = 0; i < 16; ++i) {
    const int at = index.v[i];
    r.v[i] = at < 32 ? table.val[at / 16].v[at % 16] : 0;
  }
  return r;
}
inline uint8x16_t vld1q_u8(const uint8_t* p) {
  uint8x16_t r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void vst1q_u8(uint8_t* p, uint8x16_t a) { std::memcpy(p, &a, sizeof(a)); }
#define ZO_CAST(name, to, from) \
  inline to name(from a) { return emulation::cast<to>(a); }
ZO_CAST(vreinterpretq_s16_u32, int16x8_t, uint32x4_t)
ZO_CAST(vreinterpretq_u32_s16, uint32x4_t, int16x8_t)
ZO_CAST(vreinterpretq_u8_s16, uint8x16_t, int16x8_t)
ZO_CAST(vreinterpretq_u16_u32, uint16x8_t, uint32x4_t)
ZO_CAST(vreinterpretq_u16_s16, uint16x8_t, int16x8_t)
ZO_CAST(vreinterpretq_u32_u16, uint32x4_t, uint16x8_t)
ZO_CAST(vreinterpretq_u8_u16, uint8x16_t, uint16x8_t)
ZO_CAST(vreinterpretq_s16_u8, int16x8_t, uint8x16_t)
ZO_CAST(vreinterpretq_u8_u32, uint8x16_t, uint32x4_t)
ZO_CAST(vreinterpretq_u32_u8, uint32x4_t, uint8x16_t)
ZO_CAST(vreinterpretq_u8_f32, uint8x16_t, float32x4_t)
ZO_CAST(vreinterpretq_f32_u8, float32x4_t, uint8x16_t)

#undef ZO_CAST
#undef ZO_HALVES
#undef ZO_LANES
#undef ZO_PAIR
