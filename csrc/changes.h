// Change statistics: what a pass did to the weights, and what was asked of it.
#pragma once

#include <cstdint>

namespace {

// Running sums: of (dst - src)^2, of (acc - src)^2, and the number of elements where rounding lost
// the whole change (dst = src, acc not). One for each lane.
struct Totals {
  double lanes[3][W] = {};

  void add(int what, VF v) {
    float terms[W];
    store_f32(terms, v);
    for (int i = 0; i < W; ++i) lanes[what][i] += terms[i];
  }

  void write(double* changes) const {
    for (int what = 0; what < 3; ++what) {
      changes[what] = 0.0;
      for (int i = 0; i < W; ++i) changes[what] += lanes[what][i];
    }
  }
};

// Adds `count` elements. Differences are binary32; squares are summed in binary32 within PART
// elements (at most 128, for the accuracy that is promised) and in binary64 beyond. Out of line,
// because few jobs ask for it.
template <class Src, class Dst>
__attribute__((noinline)) void add_changes(const typename Src::storage* src,
                                           const typename Dst::storage* dst, const float* acc,
                                           int count, Totals& totals) {
  constexpr int PART = W < 8 ? 8 * W : 64;  // elements; divides every pass
  const VI magnitude = splat(0x7FFFFFFFu), one = splat(1u), zero = splat(0u);
  for (int from = 0; from < count; from += PART) {
    VF moved = splat(0.0f), wanted = splat(0.0f);
    VI lost = zero;
    for (int i = from; i < from + PART; i += W) {
      const VF old = Src::load(src + i);
      const VF step = sub(Dst::load(dst + i), old), asked = sub(load_f32(acc + i), old);
      moved = fma(step, step, moved);
      wanted = fma(asked, asked, wanted);
      const VI was_asked = select_less(and_(bits(asked), magnitude), one, zero, one);
      lost = add(lost, select_less(and_(bits(step), magnitude), one, was_asked, zero));
    }
    totals.add(0, moved);
    totals.add(1, wanted);
    totals.add(2, to_float(lost));
  }
}

}  // namespace
