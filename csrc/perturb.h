// The primitive, for one instruction set:
//
//   dst = round(src_scale * src + sum_k scales[k] * z_k)
//
// per element: acc = src_scale * float32(src); acc = fma(scales[k], z_k, acc) for k in order, in
// binary32; one rounding to dst's type at the end. Included by isa.cpp after a SIMD wrapper.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "noise.h"

namespace {

using zo::Job;

#ifndef ZO_UNROLL
#define ZO_UNROLL 2
#endif
constexpr int UNROLL = ZO_UNROLL;
constexpr int STRIDE = 4 * W * UNROLL;  // elements per pass of the inner loop

struct F32 {
  using storage = float;
  static VF load(const float* p) { return load_f32(p); }
  static void store(float* p, VF v) { store_f32(p, v); }
  static void store_stochastic(float* p, VF v, VI) { store_f32(p, v); }
};

struct BF16 {
  using storage = uint16_t;
  static VF load(const uint16_t* p) { return from_bits(sll<16>(load_u16(p))); }
  static void store(uint16_t* p, VF v) {  // to nearest, ties to even
#if defined(ZO_BF16_HARDWARE)
    if (store_bf16_hardware(p, v)) return;
#endif
    const VI x = bits(v);
    const VI rounded = add(x, add(and_(srl<16>(x), splat(1u)), splat(0x7FFFu)));
    store_u16(p, srl<16>(select_nan(v, splat(0x7FC00000u), rounded)));
  }
  static void store_stochastic(uint16_t* p, VF v, VI random) {
    store_u16(p, srl<16>(select_nan(v, splat(0x7FC00000u), add(bits(v), random))));
  }
};

struct F16 {
  using storage = uint16_t;
  static VF load(const uint16_t* p) { return load_f16(p); }
  static void store(uint16_t* p, VF v) { store_f16(p, v); }
  // The top 13 rounding bits decide over the 13 bits that binary16 drops; below its normal range
  // (2^-14), where more bits are dropped, to nearest.
  static void store_stochastic(uint16_t* p, VF v, VI random) {
    const VI x = bits(v);
    const VI dithered = and_(add(x, srl<3>(random)), splat(0xFFFFE000u));
    const VI magnitude = and_(x, splat(0x7FFFFFFFu));
    const VI chosen = select_less(magnitude, splat(0x38800000u), x, dithered);
    store_f16(p, from_bits(select_nan(v, x, chosen)));
  }
};

inline void transpose_bits(VI n[4]) {
  VF f[4] = {from_bits(n[0]), from_bits(n[1]), from_bits(n[2]), from_bits(n[3])};
  transpose(f);
  for (int k = 0; k < 4; ++k) n[k] = bits(f[k]);
}

// Normals (and, if wanted, rounding bits) of UNROLL * W blocks from `block` on, in element order.
template <bool WITH_BITS>
inline void draw(uint32_t block, const Prologue& prologue, const Keys& keys, VF* z, VI* random) {
  VI a[2 * UNROLL], b[2 * UNROLL];
  for (int j = 0; j < UNROLL; ++j) {
    VI words[4];
    philox(block + static_cast<uint32_t>(j * W), prologue, keys, words);
    a[2 * j] = words[0];
    b[2 * j] = words[1];
    a[2 * j + 1] = words[2];
    b[2 * j + 1] = words[3];
  }
  VF cosine[2 * UNROLL], sine[2 * UNROLL];
  box_muller<2 * UNROLL>(a, b, cosine, sine);
  for (int j = 0; j < UNROLL; ++j) {
    z[4 * j] = cosine[2 * j];
    z[4 * j + 1] = sine[2 * j];
    z[4 * j + 2] = cosine[2 * j + 1];
    z[4 * j + 3] = sine[2 * j + 1];
    transpose(z + 4 * j);
    if (WITH_BITS) {
      rounding_bits(a[2 * j], b[2 * j], random[4 * j], random[4 * j + 1]);
      rounding_bits(a[2 * j + 1], b[2 * j + 1], random[4 * j + 2], random[4 * j + 3]);
      transpose_bits(random + 4 * j);
    }
  }
}

// Walks [job.begin, job.end), element indices of the full parameter, in passes of STRIDE aligned
// in that index; ragged ends go through a buffer, so no kernel reads or writes outside the range.
// A job never crosses a multiple of 2^34 elements (perturb.cpp cuts there), so the high counter
// word is constant within it.
template <class Body>
inline void walk(const Job& job, const Body& body) {
  const uint64_t first = job.begin / STRIDE * STRIDE;
  for (uint64_t at = first; at < job.end; at += STRIDE) {
    const uint64_t low = at < job.begin ? job.begin : at;
    const uint64_t high = job.end < at + STRIDE ? job.end : at + STRIDE;
    body(at, static_cast<size_t>(low - at), static_cast<size_t>(high - low));
  }
}

template <class Src, class Dst, bool STOCHASTIC>
void combine(const Job& job) {
  using SrcT = typename Src::storage;
  using DstT = typename Dst::storage;
  const Keys keys = make_keys(job.seed);
  const uint32_t block_hi = static_cast<uint32_t>((job.begin / 4) >> 32);
  constexpr int MAX_PROLOGUES = 16;  // more directions than this recompute theirs in each pass
  Prologue prologues[MAX_PROLOGUES];
  const int prepared = job.directions < MAX_PROLOGUES ? job.directions : MAX_PROLOGUES;
  for (int k = 0; k < prepared; ++k)
    prologues[k] = make_prologue(keys, block_hi, job.stream, job.direction[k]);
  const VF src_scale = splat(job.src_scale);
  const int last = job.directions - 1;

  const auto pass = [&](const SrcT* src, DstT* dst, uint64_t at) {
    VF acc[4 * UNROLL], z[4 * UNROLL];
    VI random[4 * UNROLL];
    const uint32_t block = static_cast<uint32_t>(at / 4);
    for (int j = 0; j < 4 * UNROLL; ++j) {
      acc[j] = mul(src_scale, Src::load(src + j * W));
      random[j] = splat(0u);
    }
    for (int k = 0; k <= last; ++k) {
      Prologue spare;
      if (k >= MAX_PROLOGUES) spare = make_prologue(keys, block_hi, job.stream, job.direction[k]);
      const Prologue& prologue = k < MAX_PROLOGUES ? prologues[k] : spare;
      if (STOCHASTIC && k == last)
        draw<true>(block, prologue, keys, z, random);
      else
        draw<false>(block, prologue, keys, z, random);
      const VF scale = splat(job.scale[k]);
      for (int j = 0; j < 4 * UNROLL; ++j) acc[j] = fma(scale, z[j], acc[j]);
    }
    for (int j = 0; j < 4 * UNROLL; ++j) {
      if (STOCHASTIC)
        Dst::store_stochastic(dst + j * W, acc[j], random[j]);
      else
        Dst::store(dst + j * W, acc[j]);
    }
  };
  const SrcT* src = static_cast<const SrcT*>(job.src);
  DstT* dst = static_cast<DstT*>(job.dst);
  walk(job, [&](uint64_t at, size_t skip, size_t count) {
    if (count == STRIDE) {
      pass(src, dst, at);
    } else {
      SrcT in[STRIDE] = {};
      DstT out[STRIDE];
      std::memcpy(in + skip, src, count * sizeof(SrcT));
      pass(in, out, at);
      std::memcpy(dst, out + skip, count * sizeof(DstT));
    }
    src += count;
    dst += count;
  });
}

// float32 normals of the range, for looking at and testing.
void normal(const Job& job) {
  const Keys keys = make_keys(job.seed);
  const Prologue prologue = make_prologue(keys, static_cast<uint32_t>((job.begin / 4) >> 32),
                                          job.stream, job.direction[0]);
  float* dst = static_cast<float*>(job.dst);
  walk(job, [&](uint64_t at, size_t skip, size_t count) {
    VF z[4 * UNROLL];
    float out[STRIDE];
    draw<false>(static_cast<uint32_t>(at / 4), prologue, keys, z, nullptr);
    for (int j = 0; j < 4 * UNROLL; ++j) store_f32(out + j * W, z[j]);
    std::memcpy(dst, out + skip, count * sizeof(float));
    dst += count;
  });
}

// Philox words of the range, word index % 4 of block index / 4, as uint32.
void random_words(const Job& job) {
  const Keys keys = make_keys(job.seed);
  const Prologue prologue = make_prologue(keys, static_cast<uint32_t>((job.begin / 4) >> 32),
                                          job.stream, job.direction[0]);
  uint32_t* dst = static_cast<uint32_t*>(job.dst);
  walk(job, [&](uint64_t at, size_t skip, size_t count) {
    uint32_t out[STRIDE];
    for (int j = 0; j < UNROLL; ++j) {
      VI words[4];
      philox(static_cast<uint32_t>(at / 4) + static_cast<uint32_t>(j * W), prologue, keys, words);
      transpose_bits(words);
      for (int k = 0; k < 4; ++k) store_u32(out + (4 * j + k) * W, words[k]);
    }
    std::memcpy(dst, out + skip, count * sizeof(uint32_t));
    dst += count;
  });
}

template <class Src>
constexpr zo::CombineRow combine_row() {
  return {{{combine<Src, F32, false>, combine<Src, F32, false>},
           {combine<Src, BF16, false>, combine<Src, BF16, true>},
           {combine<Src, F16, false>, combine<Src, F16, true>}}};
}

}  // namespace
