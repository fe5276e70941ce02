// Change statistics: what a pass did to the weights, and what was asked of it.
#pragma once

#include <cstdint>

namespace {

inline float sum(VF v) {
  float lanes[W];
  store_f32(lanes, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// Adds those of `count` elements: the sums of (dst - src)^2 and (acc - src)^2, and the number of
// elements where rounding lost the whole change (dst = src, acc not). Differences are binary32;
// squares are summed in binary32 over at most 128 elements and in binary64 beyond. Out of line,
// because few jobs ask for it.
template <class Src, class Dst>
__attribute__((noinline)) void add_changes(const typename Src::storage* src,
                                           const typename Dst::storage* dst, const float* acc,
                                           int count, double totals[3]) {
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
    totals[0] += sum(moved);
    totals[1] += sum(wanted);
    totals[2] += sum(to_float(lost));
  }
}

}  // namespace
