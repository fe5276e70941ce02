// SIMD wrapper, what AVX2 and AVX-512 have in common. Names as in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Sixteen {
  __m256i values;
};
inline Sixteen load_sixteen(const int16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Sixteen add_scaled(Sixteen a, Sixteen b, int c) {
  const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(c));
  return {_mm256_add_epi16(a.values, _mm256_mullo_epi16(b.values, factor))};
}

}  // namespace
