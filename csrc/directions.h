// z of a job's directions: one class per distribution, with one door.
//
//   STRIDE                                  elements of a pass, aligned in the full parameter
//   VECTORS                                 vectors of a step, several of which make a pass
//   go_to(at)                               before the pass over elements at .. at + STRIDE - 1
//   choose(k)                               before draws of a direction other than the first
//   round_by(k)                             before draws with the rounding bits of direction k, if
//                                           it is not the job's last
//   draw<BITS>(with_bits, from, z, random)  for the step that begins at element at + from: z and,
//                                           if both say so, the elements' rounding bits
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"
#include "noise.h"
#include "rademacher.h"

namespace {

using zo::Job;

// Directions whose part outside the inner loop is kept; more than these repeat it in each pass.
constexpr int PREPARED = 16;
inline int prepared(const Job& job) {
  return job.directions < PREPARED ? job.directions : PREPARED;
}

// A job never crosses a multiple of 2^34 elements (parallel.cpp cuts there), so the high counter
// word is constant within it.
inline Prologue normal_prologue(const Job& job, const Keys& keys, int k) {
  const uint32_t block_hi = static_cast<uint32_t>((job.begin / 4) >> 32);
  return make_prologue(keys, block_hi, job.stream, job.direction[k]);
}

class Normal {
 public:
  static constexpr int UNROLL = 2;  // Philox calls, of W blocks each, whose steps interleave
  static constexpr int VECTORS = 4 * UNROLL, STRIDE = W * VECTORS;

  explicit Normal(const Job& job) : job_(job), keys_(make_keys(job.seed)) {
    for (int k = 0; k < prepared(job); ++k) prologues_[k] = normal_prologue(job, keys_, k);
  }

  void go_to(uint64_t at) { block_ = static_cast<uint32_t>(at / 4); }

  void choose(int k) {
    if (k >= PREPARED) prologues_[PREPARED] = normal_prologue(job_, keys_, k);
    chosen_ = k < PREPARED ? k : PREPARED;
  }

  void round_by(int) {}  // its words are those of the direction that is drawn

  template <bool BITS>
  ZO_INLINE void draw(bool with_bits, size_t, VF* z, VI* random) const {
    VI a[2 * UNROLL], b[2 * UNROLL];
    for (int j = 0; j < UNROLL; ++j) {
      VI words[4];
      philox(block_ + static_cast<uint32_t>(j * W), prologues_[chosen_], keys_, words);
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
      if (BITS && with_bits) {
        rounding_bits(a[2 * j], b[2 * j], random[4 * j], random[4 * j + 1]);
        rounding_bits(a[2 * j + 1], b[2 * j + 1], random[4 * j + 2], random[4 * j + 3]);
        transpose_bits(random + 4 * j);
      }
    }
  }

 private:
  const Job& job_;
  const Keys keys_;
  uint32_t block_ = 0;
  int chosen_ = 0;
  Prologue prologues_[PREPARED + 1];  // the last one for directions beyond
};

class Rademacher {
 public:
  static constexpr int VECTORS = W == 1 ? 8 : 4, STRIDE = BYTE_SPAN;
  static_assert(W * VECTORS % 8 == 0 && STRIDE % (W * VECTORS) == 0, "steps are whole bytes' bits");

  explicit Rademacher(const Job& job)
      : job_(job),
        keys_(make_keys(job.seed)),
        rounding_(normal_prologue(job, keys_, job.directions - 1)) {}

  void go_to(uint64_t at) {
    at_ = at;
    place_ = sign_place(at);
    if (at / SPAN == superblock_) return;
    superblock_ = at / SPAN;
    for (int k = 0; k < prepared(job_); ++k) make(k, signs_[k]);
  }

  void choose(int k) {
    if (k >= PREPARED) make(k, signs_[PREPARED]);
    chosen_ = k < PREPARED ? k : PREPARED;
  }

  void round_by(int k) { rounding_ = normal_prologue(job_, keys_, k); }

  template <bool BITS>
  ZO_INLINE void draw(bool with_bits, size_t from, VF* z, VI* random) const {
    draw_signs<VECTORS>(signs_[chosen_], place_, from, z);
    // The rounding bits are those of the normals at the same address.
    for (int j = 0; BITS && with_bits && j < VECTORS; j += 4) {
      VI words[4];
      philox(static_cast<uint32_t>((at_ + from + j * W) / 4), rounding_, keys_, words);
      rounding_bits(words[0], words[1], random[j], random[j + 1]);
      rounding_bits(words[2], words[3], random[j + 2], random[j + 3]);
      transpose_bits(random + j);
    }
  }

 private:
  void make(int k, Signs& signs) const {
    make_signs(superblock_, keys_, job_.stream, job_.direction[k], signs);
  }

  const Job& job_;
  const Keys keys_;
  Prologue rounding_;
  uint64_t at_ = 0, superblock_ = ~uint64_t{0};
  SignPlace place_;
  int chosen_ = 0;
  Signs signs_[PREPARED + 1];  // the last one for directions beyond
};

}  // namespace
