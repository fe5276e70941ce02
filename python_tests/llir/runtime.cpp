// What a kernel translated by translate.py calls: llvm.nvvm.NAME is llir_nvvm_NAME here, a PTX
// instruction llir_ptx_OPCODE, dots written as underscores. An operation of a warp or block takes a
// number more, the place in the program: all its threads must be at the same.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

namespace {

// PTX ISA, shfl.sync. A lane whose source lies outside its segment reads itself.
enum Shuffle { kUp, kDown, kButterfly, kIndex };
template <Shuffle mode>
uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t b, uint32_t c, int site) {
  brought(0) = value;
  brought(1) = b & 31;
  brought(2) = c;
  const Warp& warp = together(mask, site, [](Warp& all) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const int by = all.in[lane][1], fixed = all.in[lane][2] >> 8 & 31;
      const int bound = (lane & fixed) | (all.in[lane][2] & 31 & ~fixed);
      const int from = mode == kUp          ? lane - by
                       : mode == kDown      ? lane + by
                       : mode == kButterfly ? lane ^ by
                                            : (lane & fixed) | (by & ~fixed);
      all.out[lane][0] = all.in[(mode == kUp ? from >= bound : from <= bound) ? from : lane][0];
    }
  });
  return warp.out[llir_sreg_laneid][0];
}

template <typename Fold>
uint32_t fold(uint32_t value, uint32_t mask, int site, Fold step) {
  brought(0) = value;
  const Warp& warp = together(mask, site, [&](Warp& all) {
    uint32_t result = all.in[0][0];
    for (int lane = 1; lane < kWarp; ++lane) result = step(result, all.in[lane][0]);
    for (int lane = 0; lane < kWarp; ++lane) all.out[lane][0] = result;
  });
  return warp.out[llir_sreg_laneid][0];
}

// PTX ISA, ldmatrix and stmatrix: lane 8 m + r brings the address of row r, 16 bytes, of matrix m.
// Lane l has the elements of matrix m in row l / 4, columns 2 (l % 4) and the next, or, where
// transposed, in column l / 4, those two rows.
uint16_t* element(const Warp& all, int matrix, int lane, int half, bool transposed, int site) {
  const int a = lane / 4, b = lane % 4 * 2 + half;
  const uint64_t row = all.in[8 * matrix + (transposed ? b : a)][0];
  if (row % 16) stop(kMisaligned, site, row, 16);
  if (row - kShared > static_cast<uint64_t>(launch.shared_bytes) - 16 || launch.shared_bytes < 16)
    stop(kOutOfBounds, site, row, 16);
  return reinterpret_cast<uint16_t*>(row) + (transposed ? a : b);
}

void load_matrices(uint32_t* out, uint64_t row, int matrices, bool transposed, int site) {
  brought(0) = row;
  const Warp& warp = together(0xffffffff, site, [=](Warp& all) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int m = 0; m < matrices; ++m)
        all.out[lane][m] = *element(all, m, lane, 0, transposed, site) |
                           *element(all, m, lane, 1, transposed, site) << 16;
  });
  for (int m = 0; m < matrices; ++m) out[m] = warp.out[llir_sreg_laneid][m];
}

void store_matrices(uint64_t row, const uint32_t* values, int matrices, bool transposed, int site) {
  brought(0) = row;
  for (int m = 0; m < matrices; ++m) brought(1 + m) = values[m];
  together(0xffffffff, site, [=](Warp& all) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int m = 0; m < matrices; ++m)
        for (int half = 0; half < 2; ++half)
          *element(all, m, lane, half, transposed, site) = all.in[lane][1 + m] >> 16 * half;
  });
}

// float32 to FP8 e4m3: nearest even, beyond 448 to 448.
uint16_t e4m3(float x) {
  const int sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 448) return sign | 0x7e;
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : -6;
  exponent = exponent < -6 ? -6 : exponent;
  // In steps of 2^(exponent - 3): 8 to 16 if normal, else 0 to 8; 16 is the next power of two.
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return sign | (((exponent + 6) << 3) + steps);
}

// The same number as a float16, where every FP8 value is a normal one.
uint32_t half_of_e4m3(uint32_t byte) {
  const uint32_t sign = (byte & 0x80) << 8, exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 0x7f) == 0x7f) return sign | 0x7fff;
  const float magnitude =
      std::ldexp(exponent ? 8.0f + mantissa : mantissa, (exponent ? exponent : 1) - 10);
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  return sign | (magnitude > 0 ? (bits >> 13) - (112 << 10) : 0);
}

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace

extern "C" {

// A global access outside the range of its place's last one, or misaligned.
void llir_global_access(uint64_t address, uint64_t align, uint64_t width, uint32_t site) {
  if (address & (align - 1)) stop(kMisaligned, site, address, width);
  for (int64_t i = 0; i < launch.range_count; ++i) {
    const Range& range = launch.ranges[i];
    if (width <= range.bytes && address - range.base <= range.bytes - width) {
      launch.sites[site] = {range.base, range.bytes - width + 1};
      return;
    }
  }
  stop(kOutOfBounds, site, address, width);
}

// A shared access outside the program's shared memory, or misaligned.
void llir_shared_access(uint64_t address, uint64_t align, uint64_t width, uint32_t site) {
  stop(address & (align - 1) ? kMisaligned : kOutOfBounds, site, address, width);
}

#define LLIR_SHUFFLE(name, mode)                                                                   \
  uint32_t llir_nvvm_shfl_sync_##name##_i32(uint32_t mask, uint32_t value, uint32_t b, uint32_t c, \
                                            uint32_t site) {                                       \
    return shuffle<mode>(mask, value, b, c, site);                                                 \
  }
LLIR_SHUFFLE(up, kUp)
LLIR_SHUFFLE(down, kDown)
LLIR_SHUFFLE(bfly, kButterfly)
LLIR_SHUFFLE(idx, kIndex)

#define LLIR_REDUX(name, type, expression)                                                 \
  uint32_t llir_nvvm_redux_sync_##name(uint32_t value, uint32_t mask, uint32_t site) {     \
    return fold(value, mask, site, [](type a, type b) -> uint32_t { return expression; }); \
  }
LLIR_REDUX(add, uint32_t, a + b)
LLIR_REDUX(and, uint32_t, a& b)
LLIR_REDUX(or, uint32_t, a | b)
LLIR_REDUX(xor, uint32_t, a ^ b)
LLIR_REDUX(umin, uint32_t, a < b ? a : b)
LLIR_REDUX(umax, uint32_t, a > b ? a : b)
LLIR_REDUX(min, int32_t, a < b ? a : b)
LLIR_REDUX(max, int32_t, a > b ? a : b)

uint32_t llir_nvvm_vote_ballot_sync(uint32_t mask, uint32_t predicate, uint32_t site) {
  return fold(predicate << llir_sreg_laneid, mask, site,
              [](uint32_t a, uint32_t b) { return a | b; });
}

#define LLIR_MATRIX(suffix, transposed)                                                           \
  uint32_t llir_nvvm_ldmatrix_sync_aligned_m8n8_x1##suffix(uint64_t row, uint32_t site) {         \
    uint32_t out;                                                                                 \
    load_matrices(&out, row, 1, transposed, site);                                                \
    return out;                                                                                   \
  }                                                                                               \
  void llir_nvvm_ldmatrix_sync_aligned_m8n8_x2##suffix(uint32_t* out, uint64_t row,               \
                                                       uint32_t site) {                           \
    load_matrices(out, row, 2, transposed, site);                                                 \
  }                                                                                               \
  void llir_nvvm_ldmatrix_sync_aligned_m8n8_x4##suffix(uint32_t* out, uint64_t row,               \
                                                       uint32_t site) {                           \
    load_matrices(out, row, 4, transposed, site);                                                 \
  }                                                                                               \
  void llir_nvvm_stmatrix_sync_aligned_m8n8_x1##suffix(uint64_t row, uint32_t a, uint32_t site) { \
    store_matrices(row, &a, 1, transposed, site);                                                 \
  }                                                                                               \
  void llir_nvvm_stmatrix_sync_aligned_m8n8_x2##suffix(uint64_t row, uint32_t a, uint32_t b,      \
                                                       uint32_t site) {                           \
    const uint32_t values[] = {a, b};                                                             \
    store_matrices(row, values, 2, transposed, site);                                             \
  }                                                                                               \
  void llir_nvvm_stmatrix_sync_aligned_m8n8_x4##suffix(uint64_t row, uint32_t a, uint32_t b,      \
                                                       uint32_t c, uint32_t d, uint32_t site) {   \
    const uint32_t values[] = {a, b, c, d};                                                       \
    store_matrices(row, values, 4, transposed, site);                                             \
  }
LLIR_MATRIX(_b16_p3, false)
LLIR_MATRIX(_trans_b16_p3, true)

void llir_nvvm_barrier0(uint32_t site) { block_barrier(0, site); }
void llir_nvvm_barrier_cta_sync_aligned_all(uint32_t id, uint32_t site) { block_barrier(id, site); }
void llir_nvvm_bar_warp_sync(uint32_t mask, uint32_t site) {
  together(mask, site, [](Warp&) {});
}

float llir_nvvm_div_rn_f(float a, float b) { return a / b; }
float llir_nvvm_rcp_rn_f(float x) { return 1.0f / x; }
float llir_nvvm_sqrt_rn_f(float x) { return std::sqrt(x); }
float llir_nvvm_fma_rn_f(float a, float b, float c) { return std::fma(a, b, c); }
float llir_nvvm_add_rn_f(float a, float b) { return a + b; }
float llir_nvvm_mul_rn_f(float a, float b) { return a * b; }
float llir_nvvm_floor_f(float x) { return std::floor(x); }
float llir_nvvm_ceil_f(float x) { return std::ceil(x); }
float llir_nvvm_trunc_f(float x) { return std::trunc(x); }
float llir_nvvm_round_f(float x) { return std::nearbyint(x); }
float llir_nvvm_floor_ftz_f(float x) { return std::floor(flush(x)); }
float llir_nvvm_ceil_ftz_f(float x) { return std::ceil(flush(x)); }
float llir_nvvm_trunc_ftz_f(float x) { return std::trunc(flush(x)); }
float llir_nvvm_round_ftz_f(float x) { return std::nearbyint(flush(x)); }
// The smaller magnitude, with the product of both signs.
float llir_nvvm_fmin_xorsign_abs_f(float a, float b) {
  const float sign = std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f;
  return std::copysign(std::fmin(std::fabs(a), std::fabs(b)), sign);
}

uint32_t llir_ptx_cvt_rn_satfinite_e4m3x2_f32(uint32_t high, uint32_t low) {
  return e4m3(as_float(high)) << 8 | e4m3(as_float(low));
}
uint32_t llir_ptx_cvt_rn_f16x2_e4m3x2(uint32_t pair) {
  return half_of_e4m3(pair >> 8) << 16 | half_of_e4m3(pair & 0xff);
}

}  // extern "C"
