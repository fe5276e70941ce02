// The noise contract, NOISE_SPEC = 1, in C++ (zo_kernels/noise.py states it in words).
//
//   z = normal(seed: u64, direction: u32, stream: u32, index: u64)
//
// Philox4x32-10 (Salmon et al., SC'11) with key = seed and counter = (block lo, block hi, stream,
// direction), block = index / 4; word index % 4 belongs to the element. Normals come from word
// pairs by Box-Muller, using nothing but integer operations and correctly rounded binary32
// add, mul and fma in the order written here, so that every instruction set gives the same bits.
// Compile with -ffp-contract=off: a contracted mul+add changes them.
//
// Rademacher directions (rademacher.h) have signs z = +1 or -1 at the same addresses, 128 to a
// Philox call:
//
//   s = index / 4096;  g = index % 4096 / 256;  l = index % 256 / 8;  e = index % 8
//   counter = (b lo, b hi | 2^31, stream, direction) with b = 32 s + l
//   z = 1 - 2 * (bit e of byte g of the four words, byte 0 the lowest of w0)
//
// so a machine that computes 32 neighbouring calls at once finds the signs of 8 contiguous elements
// in one byte of one of them. The top bit of the second word keeps these calls apart from those of
// normals. Rounding bits are those of the normals at the same address, whatever the distribution.
//
// A SIMD wrapper (simd_*.h) must be included first: VF, VI, Wide, W and their operations.
#pragma once

#include <cstdint>

// For what the inner loops call: out of line, it would pass its vectors through memory.
#ifndef ZO_INLINE
#define ZO_INLINE inline __attribute__((always_inline))
#endif
// A condition that does not hold where speed counts; its code goes out of the way.
#define ZO_RARELY(condition) __builtin_expect(condition, 0)

namespace {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

// csrc/fit_polynomials.py prints these, lowest power first, with their error bounds.
constexpr float RADIUS[5] = {0x1.5bfe7ep+21f, -0x1.38d5d0p+20f, 0x1.3e40b8p+19f, -0x1.6614e4p+18f,
                             0x1.43b97ep+17f};
constexpr float SQRT[4] = {0x1.056beep-10f, -0x1.489ed2p-10f, 0x1.ef6cc2p-11f, -0x1.283786p-12f};
constexpr float SINE[4] = {0x1.921f5cp+1f, -0x1.4ab276p+2f, 0x1.455cd6p+1f, -0x1.1bf83ep-1f};
constexpr float COSINE[4] = {0x1.ffff20p-1f, -0x1.3bc5a8p+2f, 0x1.02a486p+2f, -0x1.38de84p+0f};
constexpr uint32_t RSQRT_SEED = 0x5F1FF800u;

struct Keys {
  WideKey k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];
  uint64_t first_k0, first_k1, second_k0, second_k1, third_k1;  // those that Prologue absorbs
};

inline Keys make_keys(uint64_t seed) {
  Keys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  keys.first_k0 = k0;
  keys.first_k1 = k1;
  keys.second_k0 = k0 + PHILOX_W0;
  keys.second_k1 = k1 + PHILOX_W1;
  keys.third_k1 = k1 + 2 * PHILOX_W1;
  for (int r = 0; r < PHILOX_ROUNDS; ++r) {
    keys.k0[r] = wide_key(k0);
    keys.k1[r] = wide_key(k1);
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return keys;
}

// The part of the first rounds that is the same for all counters of one (stream, direction) with
// equal high block words: half of the multiplications of two rounds leave the inner loop.
struct Prologue {
  WideKey round1_c2, round2_c0, round2_c2, round3_c2;
};

inline Prologue make_prologue(const Keys& keys, uint32_t block_hi, uint32_t stream,
                              uint32_t direction) {
  const uint64_t low = 0xFFFFFFFFu;
  const uint64_t stream_product = static_cast<uint64_t>(stream) * PHILOX_M1;
  const uint64_t c0 = ((stream_product >> 32) ^ block_hi ^ keys.first_k0) & low;
  const uint64_t product = c0 * PHILOX_M0;
  return {wide_key((direction ^ keys.first_k1) & low),
          wide_key((stream_product ^ keys.second_k0) & low),
          wide_key(((product >> 32) ^ keys.second_k1) & low),
          wide_key((product ^ keys.third_k1) & low)};
}

// The four words of counters base .. base + W - 1 (base a multiple of W), in the wrapper's lane
// order: transpose() of them is element order.
inline void philox(uint32_t base, const Prologue& p, const Keys& keys, VI words[4]) {
  Wide c3 = wide_mul(wide_counters(base), PHILOX_M0);  // round 1
  Wide c2 = wide_xor(wide_hi(c3), p.round1_c2);
  Wide c1 = wide_mul(c2, PHILOX_M1);  // round 2
  Wide c0 = wide_xor(wide_hi(c1), p.round2_c0);
  c2 = wide_xor(c3, p.round2_c2);
  {  // round 3: c3 is still the same in all lanes
    const Wide p0 = wide_mul(c0, PHILOX_M0), p1 = wide_mul(c2, PHILOX_M1);
    c0 = wide_xor3(wide_hi(p1), c1, keys.k0[2]);
    c1 = p1;
    c2 = wide_xor(wide_hi(p0), p.round3_c2);
    c3 = p0;
  }
#pragma GCC unroll 8
  for (int r = 3; r < PHILOX_ROUNDS; ++r) {
    const Wide p0 = wide_mul(c0, PHILOX_M0), p1 = wide_mul(c2, PHILOX_M1);
    c0 = wide_xor3(wide_hi(p1), c1, keys.k0[r]);
    c1 = p1;
    c2 = wide_xor3(wide_hi(p0), c3, keys.k1[r]);
    c3 = p0;
  }
  words[0] = wide_merge(c0);
  words[1] = wide_merge(c1);
  words[2] = wide_merge(c2);
  words[3] = wide_merge(c3);
}

// Box-Muller on N independent word pairs in lockstep (the statements interleave for latency).
//   u  = (2 * (a >> 8) + 1) * 2^-25 rounded to binary32, in (0, 1]
//   y  = -log2(u) * 2^23, from the distance d of u's bits below those of 1 and its mantissa 1.5 + h
//   r  = sqrt(2 ln 2 * 2^-23 * y), from an integer seed of 1/sqrt(y) and a cubic
//   t  = centred half turn from bits 8..30 of b, bit 31 of b is the sign of the cosine
template <int N>
ZO_INLINE void box_muller(const VI* a, const VI* b, VF* cosine, VF* sine) {
#define EACH for (int k = 0; k < N; ++k)
  VF h[N], q[N], d[N], p[N], y[N], g[N], w[N], t[N], x[N], s[N], c[N];
  VI u[N];
  // 2^25 u as a signed conversion, which all instruction sets have: 25 bits, one rounding.
  EACH u[k] = bits(to_float(or_(srl<7>(a[k]), splat(1u))));
  EACH d[k] = to_float(sub(splat(0x4C000000u), u[k]));
  EACH h[k] = sub(from_bits(or_(and_(u[k], splat(0x7FFFFFu)), splat(0x3F800000u))), splat(1.5f));
  EACH t[k] =
      fma(to_float(and_(b[k], splat(0x7FFFFF00u))), splat(0x1p-31f), splat(-0.5f + 0x1p-24f));
  EACH q[k] = fma(h[k], h[k], splat(-0.25f));
  EACH p[k] = fma(h[k], splat(RADIUS[4]), splat(RADIUS[3]));
  EACH x[k] = mul(t[k], t[k]);
  EACH p[k] = fma(p[k], h[k], splat(RADIUS[2]));
  EACH c[k] = fma(x[k], splat(COSINE[3]), splat(COSINE[2]));
  EACH p[k] = fma(p[k], h[k], splat(RADIUS[1]));
  EACH s[k] = fma(x[k], splat(SINE[3]), splat(SINE[2]));
  EACH p[k] = fma(p[k], h[k], splat(RADIUS[0]));
  EACH c[k] = fma(c[k], x[k], splat(COSINE[1]));
  EACH y[k] = fma(q[k], p[k], d[k]);
  EACH s[k] = fma(s[k], x[k], splat(SINE[1]));
  EACH g[k] = from_bits(sub(splat(RSQRT_SEED), srl<1>(bits(y[k]))));
  EACH c[k] = fma(c[k], x[k], splat(COSINE[0]));
  EACH y[k] = mul(y[k], g[k]);
  EACH s[k] = fma(s[k], x[k], splat(SINE[0]));
  EACH w[k] = mul(y[k], g[k]);
  EACH c[k] = flip_sign(c[k], b[k]);
  EACH p[k] = fma(w[k], splat(SQRT[3]), splat(SQRT[2]));
  EACH s[k] = mul(s[k], t[k]);
  EACH p[k] = fma(p[k], w[k], splat(SQRT[1]));
  EACH p[k] = fma(p[k], w[k], splat(SQRT[0]));
  EACH y[k] = mul(y[k], p[k]);
  EACH cosine[k] = mul(y[k], c[k]);
  EACH sine[k] = mul(y[k], s[k]);
#undef EACH
}

// From one vector per word to element order, in place.
inline void transpose_bits(VI n[4]) {
  VF f[4] = {from_bits(n[0]), from_bits(n[1]), from_bits(n[2]), from_bits(n[3])};
  transpose(f);
  for (int k = 0; k < 4; ++k) n[k] = bits(f[k]);
}

// 16 rounding bits for each element of a pair, from the low bytes that the normals leave unused.
inline void rounding_bits(VI a, VI b, VI& first, VI& second) {
  const VI low = splat(0xFFu);
  const VI la = and_(a, low), lb = and_(b, low);
  first = or_(sll<8>(la), lb);
  second = or_(sll<8>(lb), la);
}

}  // namespace
