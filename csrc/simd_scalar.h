// SIMD wrapper, one lane: the plain C++ reading of every operation the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int W = 1;
using VF = float;
struct VI {
  uint32_t v;
};
using Wide = uint64_t;     // one counter word in the low half; what is above is ignored
using WideKey = uint64_t;  // a 32-bit value as wide_xor wants it in memory

inline VF splat(float x) { return x; }
inline VI splat(uint32_t x) { return {x}; }
inline VF fma(VF a, VF b, VF c) { return std::fma(a, b, c); }
inline VF mul(VF a, VF b) { return a * b; }
inline VF add(VF a, VF b) { return a + b; }
inline VF sub(VF a, VF b) { return a - b; }
inline VI add(VI a, VI b) { return {a.v + b.v}; }
inline VI sub(VI a, VI b) { return {a.v - b.v}; }
inline VI and_(VI a, VI b) { return {a.v & b.v}; }
inline VI or_(VI a, VI b) { return {a.v | b.v}; }
template <int N>
inline VI sll(VI a) {
  return {a.v << N};
}
template <int N>
inline VI srl(VI a) {
  return {a.v >> N};
}
template <int N>
inline VI sra(VI a) {
  return {static_cast<uint32_t>(static_cast<int32_t>(a.v) >> N)};
}
inline VI sll_each(VI a, VI n) { return {a.v << n.v}; }
// The number of each lane, modulo 8.
inline VI lanes_mod_8() { return {0}; }
// For lanes that are contiguous elements, the word of each one's 8; the next 8 have theirs 4 on.
inline VI load_words_of_8(const uint32_t* p) { return {*p}; }
inline VF to_float(VI a) { return static_cast<float>(static_cast<int32_t>(a.v)); }
inline VI bits(VF a) {
  VI r;
  std::memcpy(&r.v, &a, 4);
  return r;
}
inline VF from_bits(VI a) {
  VF r;
  std::memcpy(&r, &a.v, 4);
  return r;
}
inline VF flip_sign(VF a, VI b) { return from_bits({bits(a).v ^ (b.v & 0x80000000u)}); }
inline VI select_nan(VF v, VI if_nan, VI otherwise) { return v != v ? if_nan : otherwise; }
// Lanes where the integer a, below 2^31, is smaller than b.
inline VI select_less(VI a, VI b, VI yes, VI no) { return a.v < b.v ? yes : no; }

inline VI max_u32(VI a, VI b) { return a.v > b.v ? a : b; }
inline VI min_u32(VI a, VI b) { return a.v < b.v ? a : b; }
// All bits of the lanes where it is so; less compares signed.
inline VI less(VI a, VI b) {
  return {static_cast<int32_t>(a.v) < static_cast<int32_t>(b.v) ? ~0u : 0u};
}
inline VI equal(VI a, VI b) { return {a.v == b.v ? ~0u : 0u}; }
// The top bit of each lane.
constexpr unsigned ALL_LANES = 1;
inline unsigned mask_of(VI a) { return a.v >> 31; }
// The lanes in the mask as bytes, one after the other, and back (zeros elsewhere); they hold values
// below 2^8. Up to W bytes are written, and read, whatever the mask.
inline void compress_bytes(uint8_t* p, VI a, unsigned) { *p = static_cast<uint8_t>(a.v); }
inline VI expand_bytes(const uint8_t* p, unsigned mask) { return {mask ? *p : 0u}; }

inline VF div(VF a, VF b) { return a / b; }
// Of numbers; which zero comes out of two is left open.
inline VF smaller(VF a, VF b) { return a < b ? a : b; }
inline VF larger(VF a, VF b) { return a > b ? a : b; }
// All bits of the lanes where a > b.
inline VI above(VF a, VF b) { return {a > b ? ~0u : 0u}; }
inline VI xor_(VI a, VI b) { return {a.v ^ b.v}; }
// For masks of all bits of lanes.
inline VI pick(VI mask, VI yes, VI no) { return mask.v ? yes : no; }
inline VI max_s32(VI a, VI b) {
  return static_cast<int32_t>(a.v) > static_cast<int32_t>(b.v) ? a : b;
}
inline VI min_s32(VI a, VI b) {
  return static_cast<int32_t>(a.v) < static_cast<int32_t>(b.v) ? a : b;
}
// The greatest and the least lane, signed.
inline int32_t highest(VI a) { return static_cast<int32_t>(a.v); }
inline int32_t lowest(VI a) { return static_cast<int32_t>(a.v); }

inline bool any_bit(VI a) { return a.v != 0; }

// Vectors of 16-bit lanes, two of them where VI has one.
inline VI halves(int low, int high) {
  return {(static_cast<uint32_t>(low) & 0xFFFFu) | static_cast<uint32_t>(high) << 16};
}
inline int half_of(VI a, int i) { return static_cast<int16_t>(a.v >> (16 * i)); }
inline VI max_s16(VI a, VI b) {
  const auto each = [&](int i) {
    return half_of(a, i) > half_of(b, i) ? half_of(a, i) : half_of(b, i);
  };
  return halves(each(0), each(1));
}
inline VI min_s16(VI a, VI b) {
  const auto each = [&](int i) {
    return half_of(a, i) < half_of(b, i) ? half_of(a, i) : half_of(b, i);
  };
  return halves(each(0), each(1));
}
// Patterns of 16-bit floats as integers in the order of their values, -0 below +0; and back.
inline VI ordered_16(VI a) {
  const auto each = [&](int i) { return half_of(a, i) ^ (half_of(a, i) < 0 ? 0x7FFF : 0); };
  return halves(each(0), each(1));
}

// Eight floats, and the one at the place that each lane names.
struct Eight {
  const float* values;
};
inline Eight load_eight(const float* p) { return {p}; }
inline VF at(const Eight& eight, VI place) { return eight.values[place.v]; }

// Sixteen 16-bit integers, and a + b * c.
struct Sixteen {
  int16_t values[16];
};
inline Sixteen load_sixteen(const int16_t* p) {
  Sixteen r;
  std::memcpy(r.values, p, sizeof(r.values));
  return r;
}
inline Sixteen add_scaled(Sixteen a, const Sixteen& b, int c) {
  for (int i = 0; i < 16; ++i) a.values[i] = static_cast<int16_t>(a.values[i] + b.values[i] * c);
  return a;
}
// Values as a search tree: [1] is the root, the children of [i] are [2 i] and [2 i + 1], [0] is not
// looked at. A 16-bit lane above an entry goes to its second child, and ends at a place, 16 to 31.
struct Tree {
  Sixteen entries;
};
inline Tree make_tree(const Sixteen& entries) { return {entries}; }
inline VI descend(const Tree& tree, VI a) {
  const auto each = [&](int lane) {
    int i = 1;
    while (i < 16) i = 2 * i + (half_of(a, lane) > tree.entries.values[i]);
    return i;
  };
  return halves(each(0), each(1));
}
// What stands at places.
struct Outcomes {
  Sixteen values;
};
inline Outcomes make_outcomes(const Sixteen& values) { return {values}; }
inline VI at(const Outcomes& outcomes, VI place) {
  const auto each = [&](int lane) { return outcomes.values.values[half_of(place, lane) - 16]; };
  return halves(each(0), each(1));
}

inline WideKey wide_key(uint64_t k) { return k; }
inline Wide wide_counters(uint32_t base) { return base; }
inline Wide wide_mul(Wide a, uint32_t m) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m;
}
inline Wide wide_hi(Wide a) { return a >> 32; }
inline Wide wide_xor(Wide a, WideKey b) { return a ^ b; }
inline Wide wide_xor3(Wide a, Wide b, WideKey c) { return a ^ b ^ c; }
inline VI wide_merge(Wide a) { return {static_cast<uint32_t>(a)}; }
inline void transpose(VF*) {}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return from_bits({sign | 0x7F800000u | (mantissa << 13)});
  return from_bits({sign | ((exponent + 112) << 23) | (mantissa << 13)});
}

inline uint16_t float_to_half(float f) {
  uint32_t x = bits(f).v;
  const uint32_t sign = (x >> 16) & 0x8000u;
  x &= 0x7FFFFFFFu;
  if (x > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (x >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (x < 0x38800000u) {  // subnormal half: the float adder rounds at 2^-24 when 0.5 is added
    const float shifted = from_bits({x}) + 0.5f;
    return static_cast<uint16_t>(sign | (bits(shifted).v - 0x3F000000u));
  }
  x += 0xFFFu + ((x >> 13) & 1);
  return static_cast<uint16_t>(sign | ((x - 0x38000000u) >> 13));
}

inline VF load_f32(const float* p) { return *p; }
inline void store_f32(float* p, VF v) { *p = v; }
inline VI load_u16(const uint16_t* p) { return {*p}; }
// The lanes of a, then those of b; they hold values below 2^16.
inline void store_u16(uint16_t* p, VI a, VI b) {
  p[0] = static_cast<uint16_t>(a.v);
  p[1] = static_cast<uint16_t>(b.v);
}
inline VF load_f16(const uint16_t* p) { return half_to_float(*p); }
inline void store_f16(uint16_t* p, VF v) { *p = float_to_half(v); }
inline VF round_f16(VF v) { return half_to_float(float_to_half(v)); }
// Of any four bytes.
inline VI load_u32(const void* p) {
  VI r;
  std::memcpy(&r.v, p, 4);
  return r;
}
inline void store_u32(void* p, VI v) { std::memcpy(p, &v.v, 4); }

}  // namespace
