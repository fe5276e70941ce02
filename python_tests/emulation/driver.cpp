// One instruction set's kernels behind a C interface, for test_emulated_isas.py. Includes the
// translation unit itself, so that Philox and Box-Muller can be called on chosen words too.
#include "isa.cpp"

using zo::Job;

static const zo::Kernels& table() { return zo::ZO_JOIN(kernels_, ZO_ISA); }

extern "C" {

const char* isa_name() { return table().isa; }

void combine_job(int distribution, int src_dtype, int dst_dtype, int stochastic, const void* src,
                 void* dst, uint64_t begin, uint64_t end, uint64_t seed, uint32_t stream,
                 int directions, const uint32_t* direction, const float* scale, float src_scale,
                 double* changes) {
  const Job job = {src,        dst,       begin, end,       seed,   stream,
                   directions, direction, scale, src_scale, changes};
  table().of[distribution].combine[src_dtype].at[dst_dtype][stochastic](job);
}

// distribution: -1 for words.
void emit_job(int distribution, void* dst, uint64_t begin, uint64_t end, uint64_t seed,
              uint32_t stream, uint32_t direction) {
  const Job job = {nullptr, dst, begin, end, seed, stream, 1, &direction, nullptr, 1.0f, nullptr};
  (distribution < 0 ? table().random_words : table().of[distribution].emit)(job);
}

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
    float fa[W], fb[W];
    std::memcpy(fa, a + i, sizeof(fa));
    std::memcpy(fb, b + i, sizeof(fb));
    const VI x = bits(load_f32(fa)), y = bits(load_f32(fb));
    VF c, s;
    box_muller<1>(&x, &y, &c, &s);
    store_f32(cosine + i, c);
    store_f32(sine + i, s);
  }
}
}
