// One instruction set's kernels behind a C interface, for emulated.py. Includes the translation
// unit itself, so that Philox and Box-Muller can be called on chosen words too.
#include "exceptions.cpp"
#include "isa.cpp"
#include "parallel.h"

using zo::Exceptions;
using zo::Job;

static const zo::Distribution& kernels_of(int distribution) {
  return zo::ZO_JOIN(kernels_, ZO_ISA).of[distribution];
}

extern "C" {

const char* isa_name() { return zo::ZO_JOIN(kernels_, ZO_ISA).isa; }
uint64_t job_size() { return sizeof(Job); }

void combine_job(const Job* job, int distribution, int src_dtype, int dst_dtype, int stochastic) {
  kernels_of(distribution).combine[src_dtype].at[dst_dtype][stochastic](*job);
}

void pair_job(const Job* job, int distribution, int dtype) {
  kernels_of(distribution).pair[dtype](*job);
}

void advance_job(const Job* job, int distribution, int dtype, int rounding) {
  kernels_of(distribution).advance[dtype][rounding](*job);
}

void swap_job(const Job* job, int distribution, int dtype, int what) {
  kernels_of(distribution).swap[dtype][what](*job);
}

// distribution: -1 for words.
void emit_job(const Job* job, int distribution) {
  if (distribution < 0)
    random_words(*job);
  else
    kernels_of(distribution).emit(*job);
}

uint64_t quant_job_size() { return sizeof(zo::QuantJob); }
void fake_quant_job(const zo::QuantJob* job, int dtype, int format, float* ends) {
  const zo::Extremes found = zo::ZO_JOIN(kernels_, ZO_ISA).fake_quant[dtype].of[format](*job);
  ends[0] = found.low;
  ends[1] = found.high;
}

void perturb_quant_job(const Job* job, const zo::QuantJob* quant, int distribution, int dtype,
                       int format, float* ends) {
  const int itemsize = zo::itemsize(dtype);
  const zo::Task task{kernels_of(distribution).combine[dtype].at[dtype][0], *job, itemsize,
                      itemsize};
  const zo::Extremes found = zo::run_perturb_quant(
      task, zo::ZO_JOIN(kernels_, ZO_ISA).fake_quant[dtype].of[format], *quant, 1);
  ends[0] = found.low;
  ends[1] = found.high;
}

Exceptions* exceptions_new() { return new Exceptions; }
void exceptions_delete(Exceptions* kept) { delete kept; }
uint64_t exceptions_bytes(const Exceptions* kept) { return kept->bytes(); }
int exceptions_are_a_copy(const Exceptions* kept) { return kept->is_copy(); }
// All of it: strays, escapes and codes, or the copy.
const void* exceptions_data(const Exceptions* kept) { return kept->copy(); }

// The words of one block, any 64-bit block number.
void philox_block(uint64_t block, uint64_t seed, uint32_t stream, uint32_t direction,
                  uint32_t out[4]) {
  const Keys keys = make_keys(seed);
  const Prologue prologue =
      make_prologue(keys, static_cast<uint32_t>(block >> 32), stream, direction);
  VI words[4];
  philox(static_cast<uint32_t>(block) / W * W, prologue, keys, words);
  transpose_bits(words);
  uint32_t all[4 * W];
  for (int k = 0; k < 4; ++k) store_u32(all + k * W, words[k]);
  std::memcpy(out, all + block % W * 4, 16);
}

// Both normals of the word pairs (a[i], b[i]), count a multiple of W.
void box_muller_pairs(const uint32_t* a, const uint32_t* b, float* cosine, float* sine,
                      uint64_t count) {
  for (uint64_t i = 0; i < count; i += W) {
    const VI x = load_u32(a + i), y = load_u32(b + i);
    VF c, s;
    box_muller<1>(&x, &y, &c, &s);
    store_f32(cosine + i, c);
    store_f32(sine + i, s);
  }
}
}
