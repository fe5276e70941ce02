// Perturbed weights in place, from which the unperturbed ones can be had back bit for bit.
//
// Let v = round(w + c z) be in memory and p = round(v - c z). One rounding lies between w and v, so
// p is w wherever numbers around v are not further apart than around w. An element is flagged where
// they may be: its exponent is larger in v than in p, or p is a power of two (below which numbers
// are closer) or zero with no larger exponent than v. Flags need v and z alone, so no places are
// stored: one code for each flagged element,
//
//   code = pattern difference of w and p, in units of the weights' spacing, + 127,
//
// or 255 where that is no byte. What differs from p and is not flagged (a tie, a value rounded
// twice) is kept with its place. The encoder sees w: whatever flags and codes would not give back
// is kept whole, so that this file's reasoning decides how much is kept and never what comes back.
#pragma once

#include <type_traits>
#include <utility>

#include "exceptions.h"
#include "perturb.h"

namespace {

// round(v - c z), but halves up and binary16 on the finer grid of its normal numbers throughout:
// any value does that encoder and decoder compute alike.
template <class T>
inline VI predict(VF v, VF z, VF minus_scale) {
  const VI x = bits(fma(minus_scale, z, v));
  if (T::SHIFT == 0) return x;
  constexpr uint32_t UNIT = 1u << T::SHIFT;
  return and_(add(x, splat(UNIT / 2)), splat(~(UNIT - 1)));
}

// Lanes of v and its prediction p where p may not be w.
template <class T>
inline VI flagged(VF v, VI p) {
  const VI magnitude = and_(p, splat(0x7FFFFFFFu));
  // The exponent of the next smaller magnitude; -1 below zero.
  const VI below = and_(sub(magnitude, splat(1u)), splat(0xFF800000u));
  const VI exponent = and_(bits(v), splat(0x7F800000u));
  // Where the prediction's grid is finer than the weights', they differ in most elements.
  constexpr bool FINER = T::SMALLEST_NORMAL > F32::SMALLEST_NORMAL;
  return less(below, FINER ? max_u32(exponent, splat(T::SMALLEST_NORMAL)) : exponent);
}

// What is kept whole, read in order. Apart from the decoder, so that the addresses taken by rare
// calls do not keep its other members in memory.
struct Whole {
  const uint32_t* escape = nullptr;
  const zo::Stray *stray = nullptr, *strays_end = nullptr;

  uint32_t next_place() const { return stray == strays_end ? ~0u : stray->place; }

  __attribute__((noinline)) VI with_escapes(VI w, unsigned escaped) {
    uint32_t lanes[W];
    store_u32(lanes, w);
    for (int i = 0; i < W; ++i)
      if (escaped >> i & 1) lanes[i] = *escape++;
    return load_u32(lanes);
  }

  __attribute__((noinline)) VI with_strays(VI w, uint32_t place) {
    uint32_t lanes[W];
    store_u32(lanes, w);
    for (; stray != strays_end && stray->place < place + W; ++stray)
      lanes[stray->place - place] = stray->bits;
    return load_u32(lanes);
  }
};

template <class T>
class Decoder {
 public:
  explicit Decoder(const zo::Exceptions& held) {
    if (held.is_copy()) return;
    code_ = held.codes();
    whole_ = {held.escapes(), held.strays(), held.strays() + held.stray_count()};
    next_place_ = whole_.next_place();
  }

  // w of one vector; `lanes` are those inside the piece, `place` is the first one's.
  ZO_INLINE VF recover(VF v, VF z, VF minus_scale, unsigned lanes, uint32_t place) {
    const VI p = predict<T>(v, z, minus_scale);
    const VI flags = flagged<T>(v, p);
    const unsigned mask = mask_of(flags) & lanes;
    const VI code = expand_bytes(code_, mask);
    code_ += __builtin_popcount(mask);
    VI w = add(p, and_(flags, sll<T::SHIFT>(sub(code, splat(127u)))));
    const unsigned escaped = mask_of(equal(code, splat(255u)));
    if (ZO_RARELY(escaped)) w = whole_.with_escapes(w, escaped);
    if (ZO_RARELY(next_place_ < place + W)) {
      w = whole_.with_strays(w, place);
      next_place_ = whole_.next_place();
    }
    return from_bits(w);
  }

 private:
  const uint8_t* code_ = nullptr;
  uint32_t next_place_ = ~0u;
  Whole whole_;
};

// Where the encoder keeps what codes do not give back; apart from it for the same reason.
struct WholeWriter {
  uint32_t* escape;
  zo::Stray* stray;

  __attribute__((noinline)) void keep(VF w, unsigned escaped, unsigned strays, uint32_t place) {
    uint32_t lanes[W];
    store_u32(lanes, bits(w));
    for (uint32_t i = 0; i < W; ++i) {
      if (escaped >> i & 1) *escape++ = lanes[i];
      if (strays >> i & 1) *stray++ = {place + i, lanes[i]};
    }
  }
};

template <class T>
class Encoder {
 public:
  Encoder()
      : lists_(zo::collected()),
        code_(lists_.codes.data()),
        whole_{lists_.escapes.data(), lists_.strays.data()} {}

  // Notes what gives w back from v; arguments as for Decoder::recover.
  ZO_INLINE void note(VF w, VF v, VF z, VF minus_scale, unsigned lanes, uint32_t place) {
    const VI p = predict<T>(v, z, minus_scale);
    const VI difference = sub(bits(w), p);
    const unsigned mask = mask_of(flagged<T>(v, p)) & lanes;
    const VI code = min_u32(add(sra<T::SHIFT>(difference), splat(127u)), splat(255u));
    compress_bytes(code_, code, mask);
    code_ += __builtin_popcount(mask);
    const unsigned escaped = mask_of(equal(code, splat(255u))) & mask;
    const unsigned strays = ~mask_of(equal(difference, splat(0u))) & lanes & ~mask;
    if (ZO_RARELY(escaped | strays)) whole_.keep(w, escaped, strays, place);
  }

  size_t bytes() const {
    return stray_count() * sizeof(zo::Stray) + escape_count() * sizeof(uint32_t) + code_count();
  }

  void write(zo::Exceptions& kept) const {
    kept.set(lists_.strays.data(), stray_count(), lists_.escapes.data(), escape_count(),
             lists_.codes.data(), code_count());
  }

 private:
  size_t stray_count() const { return whole_.stray - lists_.strays.data(); }
  size_t escape_count() const { return whole_.escape - lists_.escapes.data(); }
  size_t code_count() const { return code_ - lists_.codes.data(); }

  zo::Collected& lists_;
  uint8_t* code_;
  WholeWriter whole_;
};

// The lanes of a vector that begins `from` elements into a pass and are in [skip, skip + count).
inline unsigned lanes_inside(size_t from, size_t skip, size_t count) {
  unsigned lanes = 0;
  for (size_t i = 0; i < W; ++i) lanes |= (from + i >= skip && from + i < skip + count) << i;
  return lanes;
}

// w is what memory holds or, with HELD, what job.held gives back from it. Memory then gets
// round(src_scale * w + scale * z), or w where no scale is given; with KEPT, job.kept gets what
// gives w back from that.
template <class T, class Directions, bool HELD, bool KEPT, bool STOCHASTIC>
void swap(const Job& job) {
  using Storage = typename T::storage;
  constexpr int VECTORS = Directions::VECTORS, STRIDE = Directions::STRIDE;
  Directions directions(job);
  const bool scaled = job.scale != nullptr;
  const VF scale = splat(scaled ? job.scale[0] : 0.0f), src_scale = splat(job.src_scale);
  const VF minus_scale = splat(scaled ? -job.scale[0] : 0.0f);
  const VF minus_held_scale = splat(-job.held_scale);
  const zo::Exceptions none;
  Decoder<T> decoder(HELD ? *job.held : none);
  Encoder<T> encoder;
  const bool copied = HELD && job.held->is_copy();
  const Storage* copy = copied ? static_cast<const Storage*>(job.held->copy()) : nullptr;
  const bool measured = job.changes != nullptr;
  float before_rounding[STRIDE], old[STRIDE];
  Totals totals;

  // One pass over `here`, in place; `copies` are the weights, if they were copied.
  const auto pass = [&](auto whole, Storage* here, const Storage* copies, uint64_t at, size_t skip,
                        size_t count) {
    directions.go_to(at);
    const uint32_t first_place = static_cast<uint32_t>(at % zo::PIECE);
    for (size_t from = 0; from < STRIDE; from += W * VECTORS) {
      VF z[VECTORS], w[VECTORS], acc[VECTORS];
      VI random[VECTORS];
      directions.template draw<STOCHASTIC>(true, from, z, random);
      const auto lanes = [&](size_t i) { return whole ? ALL_LANES : lanes_inside(i, skip, count); };
      const auto place = [&](size_t i) { return first_place + static_cast<uint32_t>(i); };
      for (int j = 0; j < VECTORS; ++j) {
        const size_t i = from + j * W;
        w[j] = T::load((copies ? copies : here) + i);
        if (HELD && !copies)
          w[j] = decoder.recover(w[j], z[j], minus_held_scale, lanes(i), place(i));
      }
      for (int j = 0; j < VECTORS; ++j) {
        acc[j] = scaled ? fma(scale, z[j], mul(src_scale, w[j])) : w[j];
        if (ZO_RARELY(measured)) {
          store_f32(old + from + j * W, w[j]);
          store_f32(before_rounding + from + j * W, acc[j]);
        }
        acc[j] = STOCHASTIC ? T::rounded_stochastic(acc[j], random[j]) : T::rounded(acc[j]);
      }
      for (int j = 0; KEPT && j < VECTORS; ++j) {
        const size_t i = from + j * W;
        encoder.note(w[j], acc[j], z[j], minus_scale, lanes(i), place(i));
      }
      for (int j = 0; j < VECTORS; j += 2) T::store_exact(here + from + j * W, acc + j);
    }
  };

  Storage* weights = static_cast<Storage*>(job.dst);
  walk<STRIDE>(job, [&](uint64_t at, size_t skip, size_t count) {
    const bool ragged = count != STRIDE;
    Storage buffer[STRIDE], copies[STRIDE];
    if (ZO_RARELY(ragged)) {
      std::memset(buffer, 0, sizeof(buffer));
      std::memcpy(buffer + skip, weights, count * sizeof(Storage));
      if (copied) {
        std::memset(copies, 0, sizeof(copies));
        std::memcpy(copies + skip, copy, count * sizeof(Storage));
      }
      pass(std::false_type(), buffer, copied ? copies : nullptr, at, skip, count);
      std::memcpy(weights, buffer + skip, count * sizeof(Storage));
    } else {
      pass(std::true_type(), weights, copy, at, skip, count);
    }
    if (ZO_RARELY(measured)) {
      float now[STRIDE];
      for (size_t i = 0; i < STRIDE; i += W)
        store_f32(now + i, T::load((ragged ? buffer : weights) + i));
      if (ragged) {
        clear_outside(now, skip, count);
        clear_outside(before_rounding, skip, count);
        clear_outside(old, skip, count);
      }
      add_changes<F32, F32>(old, now, before_rounding, STRIDE, totals);
    }
    weights += count;
    if (copied) copy += count;
  });
  if (measured) totals.write(job.changes);
  if (!KEPT) return;
  const size_t bytes = (job.end - job.begin) * sizeof(Storage);
  if (encoder.bytes() + zo::Exceptions::SLACK <= bytes) {
    encoder.write(*job.kept);
  } else if (copied) {
    *job.kept = std::move(*job.held);
  } else {
    // More than a copy would take: decode into one.
    zo::Exceptions lists;
    encoder.write(lists);
    Job back = job;
    back.dst = job.kept->make_copy(bytes);
    std::memcpy(back.dst, job.dst, bytes);
    back.held = &lists;
    back.held_scale = job.scale[0];
    back.scale = nullptr;
    swap<T, Directions, true, false, false>(back);
  }
}

}  // namespace
