// Emulation of the intrinsics for 16-bit lanes and for tables; the end of immintrin.h includes it.
#pragma once

namespace emulation {
struct Halves {
  int16_t h[32];
};
template <class Operation>
inline __m512i each_half(const __m512i& a, const __m512i& b, Operation operation) {
  Halves x = cast<Halves>(a);
  const Halves y = cast<Halves>(b);
  for (int i = 0; i < 32; ++i) x.h[i] = static_cast<int16_t>(operation(x.h[i], y.h[i]));
  return cast<__m512i>(x);
}
}  // namespace emulation
inline __m512i _mm512_set1_epi16(short x) {
  const uint32_t half = static_cast<uint16_t>(x);
  return _mm512_set1_epi32(static_cast<int>(half << 16 | half));
}
inline __m512i _mm512_max_epi16(__m512i a, __m512i b) {
  return emulation::each_half(a, b, [](int x, int y) { return x > y ? x : y; });
}
inline __m512i _mm512_min_epi16(__m512i a, __m512i b) {
  return emulation::each_half(a, b, [](int x, int y) { return x < y ? x : y; });
}
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  return emulation::each_half(a, b, [](int x, int y) { return x + y; });
}
inline __m512i _mm512_srai_epi16(__m512i a, unsigned n) {
  return emulation::each_half(a, a, [n](int x, int) { return x >> (n > 15 ? 15 : n); });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  return emulation::each_half(a, a, [n](int x, int) { return n > 15 ? 0 : (x & 0xFFFF) >> n; });
}
inline __mmask32 _mm512_cmpgt_epi16_mask(__m512i a, __m512i b) {
  const auto x = emulation::cast<emulation::Halves>(a), y = emulation::cast<emulation::Halves>(b);
  __mmask32 k = 0;
  for (int i = 0; i < 32; ++i) k |= static_cast<uint32_t>(x.h[i] > y.h[i]) << i;
  return k;
}
inline __m512i _mm512_mask_add_epi16(__m512i src, __mmask32 k, __m512i a, __m512i b) {
  auto r = emulation::cast<emulation::Halves>(src);
  const auto sum = emulation::cast<emulation::Halves>(_mm512_add_epi16(a, b));
  for (int i = 0; i < 32; ++i)
    if (k >> i & 1) r.h[i] = sum.h[i];
  return emulation::cast<__m512i>(r);
}
// The lanes of a that the low bits of each lane of the index name.
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  const auto from = emulation::cast<emulation::Halves>(a);
  return emulation::each_half(index, index, [&](int x, int) { return from.h[x & 31]; });
}
inline __m512i _mm512_broadcast_i64x4(__m256i a) {
  emulation::Halves r;
  for (int i = 0; i < 32; ++i) r.h[i] = static_cast<int16_t>(a.h[i % 16]);
  return emulation::cast<__m512i>(r);
}
inline __m256i _mm256_set1_epi16(short x) {
  __m256i r;
  ZO_LANES r.h[i] = static_cast<uint16_t>(x);
  return r;
}
inline __m256i _mm256_add_epi16(__m256i a, __m256i b) {
  ZO_LANES a.h[i] = static_cast<uint16_t>(a.h[i] + b.h[i]);
  return a;
}
inline __m256i _mm256_mullo_epi16(__m256i a, __m256i b) {
  ZO_LANES a.h[i] = static_cast<uint16_t>(static_cast<uint32_t>(a.h[i]) * b.h[i]);
  return a;
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
  __m512 r;
  ZO_LANES r.f[i] = a.f[index.d[i] & 15];
  return r;
}
inline __m256 _mm256_loadu_ps(const void* p) {
  __m256 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline __m512 _mm512_broadcast_f32x8(__m256 a) {
  __m512 r;
  ZO_LANES r.f[i] = a.f[i % 8];
  return r;
}
