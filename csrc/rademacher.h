// Signs of Rademacher directions, 128 to a Philox call (the contract is stated in noise.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "noise.h"

namespace {

constexpr uint32_t RADEMACHER_DOMAIN = 0x80000000u;  // in the second counter word
constexpr uint64_t SPAN = 4096;                      // elements of one superblock
constexpr uint64_t SPAN_BLOCKS = 32;                 // its Philox calls
constexpr uint64_t BYTE_SPAN = 256;                  // elements that use the same byte of them
static_assert(SPAN_BLOCKS % W == 0, "philox() computes W aligned blocks");

// The words of one superblock: words[4 * l + i] is word i of its block l.
struct Signs {
  uint32_t words[4 * SPAN_BLOCKS];
};

inline Prologue rademacher_prologue(const Keys& keys, uint64_t superblock, uint32_t stream,
                                    uint32_t direction) {
  const uint32_t block_hi = static_cast<uint32_t>(superblock * SPAN_BLOCKS >> 32);
  return make_prologue(keys, block_hi | RADEMACHER_DOMAIN, stream, direction);
}

// Out of line, so that the loop it is called from keeps its registers.
__attribute__((noinline)) void make_signs(uint64_t superblock, const Keys& keys, uint32_t stream,
                                          uint32_t direction, Signs& signs) {
  const Prologue prologue = rademacher_prologue(keys, superblock, stream, direction);
  const uint32_t first = static_cast<uint32_t>(superblock * SPAN_BLOCKS);
  for (uint32_t l = 0; l < SPAN_BLOCKS; l += W) {
    VI words[4];
    philox(first + l, prologue, keys, words);
    transpose_bits(words);
    for (int i = 0; i < 4; ++i) store_u32(signs.words + 4 * l + i * W, words[i]);
  }
}

// Where the signs of elements at .. at + BYTE_SPAN - 1 are, at a multiple of BYTE_SPAN.
struct SignPlace {
  uint32_t word;  // of each block
  VI left;        // shifted left by this, it has the bit of the lane's element on top
};

inline SignPlace sign_place(uint64_t at) {
  const uint32_t byte = static_cast<uint32_t>(at % SPAN / BYTE_SPAN);
  return {byte / 4, sub(splat(31 - byte % 4 * 8), lanes_mod_8())};
}

// z of W * N elements there, from the `from`th on, a multiple of 8.
template <int N>
ZO_INLINE void draw_signs(const Signs& signs, const SignPlace& place, size_t from, VF* z) {
  const uint32_t* words = signs.words + from / 8 * 4 + place.word;
  for (int j = 0; j < N; ++j) {
    const VI own = load_words_of_8(words + j * W / 8 * 4);
    const VI left = sub(place.left, splat(static_cast<uint32_t>(j * W % 8)));
    z[j] = flip_sign(splat(1.0f), sll_each(own, left));
  }
}

}  // namespace
