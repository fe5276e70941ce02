// The tables of one instruction set's kernels.
#pragma once

#include "advance.h"
#include "fake_quant.h"
#include "pair.h"
#include "perturb.h"
#include "swap.h"

namespace {

template <class Src, class Directions>
constexpr zo::CombineRow combine_row() {
  return {{{combine<Src, F32, Directions, false>, combine<Src, F32, Directions, false>},
           {combine<Src, BF16, Directions, false>, combine<Src, BF16, Directions, true>},
           {combine<Src, F16, Directions, false>, combine<Src, F16, Directions, true>}}};
}

template <class T>
constexpr zo::QuantRow quant_row() {
  return {{fake_quant<T, zo::INT_SYMMETRIC>, fake_quant<T, zo::INT_ASYMMETRIC>,
           fake_quant<T, zo::FLOAT>, fake_quant<T, zo::NF4>}};
}

template <class Directions>
constexpr zo::Distribution distribution() {
  constexpr Rounding NEAREST = Rounding::NEAREST, STOCHASTIC = Rounding::STOCHASTIC;
  constexpr Rounding RESIDUAL = Rounding::RESIDUAL;
  return {{combine_row<F32, Directions>(), combine_row<BF16, Directions>(),
           combine_row<F16, Directions>()},
          {pair<F32, Directions>, pair<BF16, Directions>, pair<F16, Directions>},
          // binary32 rounds to nearest whatever is asked.
          {{advance<F32, Directions, NEAREST>, advance<F32, Directions, NEAREST>,
            advance<F32, Directions, NEAREST>},
           {advance<BF16, Directions, NEAREST>, advance<BF16, Directions, STOCHASTIC>,
            advance<BF16, Directions, RESIDUAL>},
           {advance<F16, Directions, NEAREST>, advance<F16, Directions, STOCHASTIC>,
            advance<F16, Directions, RESIDUAL>}},
          {{swap<F32, Directions, false, true, false>, swap<F32, Directions, true, true, false>,
            swap<F32, Directions, true, false, false>, swap<F32, Directions, true, false, false>},
           {swap<BF16, Directions, false, true, false>, swap<BF16, Directions, true, true, false>,
            swap<BF16, Directions, true, false, false>, swap<BF16, Directions, true, false, true>},
           {swap<F16, Directions, false, true, false>, swap<F16, Directions, true, true, false>,
            swap<F16, Directions, true, false, false>, swap<F16, Directions, true, false, true>}},
          emit<Directions>};
}

}  // namespace
