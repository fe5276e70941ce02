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

#include "exceptions.h"
#include "perturb.h"

namespace {

// Lanes of v and p where p may not be w.
inline VI flagged(VF v, VF p) {
  const VI magnitude = and_(bits(p), splat(0x7FFFFFFFu));
  // The exponent of the next smaller magnitude; -1 below zero.
  const VI below = and_(sub(magnitude, splat(1u)), splat(0xFF800000u));
  return less(below, and_(bits(v), splat(0x7F800000u)));
}

template <class T>
class Decoder {
 public:
  using Storage = typename T::storage;

  explicit Decoder(const zo::Exceptions* held) : held_(*held) {
    if (held_.is_copy()) return;
    codes_ = held_.codes();
    escape_ = held_.escapes();
    stray_ = held_.strays();
    strays_end_ = stray_ + held_.stray_count();
  }

  bool is_copy() const { return held_.is_copy(); }

  // w of one vector; `lanes` are those inside the piece, `place` is the first one's.
  ZO_INLINE VF recover(VF v, VF z, VF minus_scale, unsigned lanes, uint32_t place) {
    const VF p = T::rounded(fma(minus_scale, z, v));
    const VI flags = flagged(v, p);
    const unsigned mask = mask_of(flags) & lanes;
    const VI code = expand_bytes(codes_, mask);
    codes_ += __builtin_popcount(mask);
    VI w = add(bits(p), and_(flags, sll<T::SHIFT>(sub(code, splat(127u)))));
    const unsigned escaped = mask_of(equal(code, splat(255u))) & mask;
    if (ZO_RARELY(escaped || lanes != ALL_LANES)) w = with_escapes(w, bits(p), escaped, mask);
    if (ZO_RARELY(stray_ != strays_end_ && stray_->place < place + W)) w = with_strays(w, place);
    return from_bits(w);
  }

 private:
  __attribute__((noinline)) VI with_escapes(VI w, VI p, unsigned escaped, unsigned mask) {
    uint32_t lanes[W], plain[W];
    store_u32(lanes, w);
    store_u32(plain, p);
    for (int i = 0; i < W; ++i) {
      if (!(mask >> i & 1)) lanes[i] = plain[i];  // flagged, but outside of the piece
      if (escaped >> i & 1) lanes[i] = *escape_++;
    }
    return load_u32(lanes);
  }

  __attribute__((noinline)) VI with_strays(VI w, uint32_t place) {
    uint32_t lanes[W];
    store_u32(lanes, w);
    for (; stray_ != strays_end_ && stray_->place < place + W; ++stray_)
      lanes[stray_->place - place] = stray_->bits;
    return load_u32(lanes);
  }

  const zo::Exceptions& held_;
  const uint8_t* codes_ = nullptr;
  const uint32_t* escape_ = nullptr;
  const zo::Stray *stray_ = nullptr, *strays_end_ = nullptr;
};

template <class T>
class Encoder {
 public:
  Encoder()
      : lists_(zo::collected()),
        code_(lists_.codes.data()),
        escape_(lists_.escapes.data()),
        stray_(lists_.strays.data()) {}

  // Notes what gives w back from v; arguments as for Decoder::recover.
  ZO_INLINE void note(VF w, VF v, VF z, VF minus_scale, unsigned lanes, uint32_t place) {
    const VF p = T::rounded(fma(minus_scale, z, v));
    const VI difference = sub(bits(w), bits(p));
    const unsigned mask = mask_of(flagged(v, p)) & lanes;
    const VI code = min_u32(add(sra<T::SHIFT>(difference), splat(127u)), splat(255u));
    compress_bytes(code_, code, mask);
    const unsigned escaped = mask_of(equal(code, splat(255u))) & mask;
    const unsigned strays = ~mask_of(equal(difference, splat(0u))) & lanes & ~mask;
    if (ZO_RARELY(escaped | strays)) keep(w, escaped, strays, place);
    code_ += __builtin_popcount(mask);
  }

  size_t bytes() const {
    return (stray_ - lists_.strays.data()) * sizeof(zo::Stray) +
           (escape_ - lists_.escapes.data()) * sizeof(uint32_t) + (code_ - lists_.codes.data());
  }

  void write(zo::Exceptions& kept) const {
    kept.set(lists_.strays.data(), stray_ - lists_.strays.data(), lists_.escapes.data(),
             escape_ - lists_.escapes.data(), lists_.codes.data(), code_ - lists_.codes.data());
  }

 private:
  __attribute__((noinline)) void keep(VF w, unsigned escaped, unsigned strays, uint32_t place) {
    uint32_t lanes[W];
    store_u32(lanes, bits(w));
    for (uint32_t i = 0; i < W; ++i) {
      if (escaped >> i & 1) *escape_++ = lanes[i];
      if (strays >> i & 1) *stray_++ = {place + i, lanes[i]};
    }
  }

  zo::Collected& lists_;
  uint8_t* code_;
  uint32_t* escape_;
  zo::Stray* stray_;
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
  Decoder<T> decoder(HELD ? job.held : &none);
  Encoder<T> encoder;
  const bool copied = HELD && decoder.is_copy();
  const Storage* copy = copied ? static_cast<const Storage*>(job.held->copy()) : nullptr;
  const bool measured = job.changes != nullptr;
  float before_rounding[STRIDE], old[STRIDE];
  Totals totals;

  Storage* weights = static_cast<Storage*>(job.dst);
  walk<STRIDE>(job, [&](uint64_t at, size_t skip, size_t count) {
    const bool ragged = count != STRIDE;
    Storage buffer[STRIDE], copy_buffer[STRIDE];
    Storage* here = weights;
    const Storage* copy_here = copy;
    if (ZO_RARELY(ragged)) {
      std::memset(buffer, 0, sizeof(buffer));
      std::memcpy(buffer + skip, weights, count * sizeof(Storage));
      here = buffer;
      if (copied) {
        std::memset(copy_buffer, 0, sizeof(copy_buffer));
        std::memcpy(copy_buffer + skip, copy, count * sizeof(Storage));
        copy_here = copy_buffer;
      }
    }
    directions.go_to(at);
    const uint32_t first_place = static_cast<uint32_t>(at % zo::PIECE);
    for (size_t from = 0; from < STRIDE; from += W * VECTORS) {
      VF z[VECTORS], acc[VECTORS];
      VI random[VECTORS];
      directions.template draw<STOCHASTIC>(true, from, z, random);
      for (int j = 0; j < VECTORS; ++j) {
        const size_t i = from + j * W;
        const uint32_t place = first_place + static_cast<uint32_t>(i);
        const unsigned lanes = ZO_RARELY(ragged) ? lanes_inside(i, skip, count) : ALL_LANES;
        VF w = T::load(here + i);
        if (HELD) {
          if (ZO_RARELY(copied))
            w = T::load(copy_here + i);
          else
            w = decoder.recover(w, z[j], minus_held_scale, lanes, place);
        }
        acc[j] = scaled ? fma(scale, z[j], mul(src_scale, w)) : w;
        if (ZO_RARELY(measured)) {
          store_f32(old + i, w);
          store_f32(before_rounding + i, acc[j]);
        }
        if (STOCHASTIC) {
          acc[j] = T::rounded_stochastic(acc[j], random[j]);
        } else {
          acc[j] = T::rounded(acc[j]);
          if (KEPT) encoder.note(w, acc[j], z[j], minus_scale, lanes, place);
        }
      }
      for (int j = 0; j < VECTORS; j += 2) T::store_exact(here + from + j * W, acc + j);
    }
    if (ZO_RARELY(measured)) {
      float now[STRIDE];
      for (size_t i = 0; i < STRIDE; i += W) store_f32(now + i, T::load(here + i));
      if (ragged) {
        clear_outside(now, skip, count);
        clear_outside(before_rounding, skip, count);
        clear_outside(old, skip, count);
      }
      add_changes<F32, F32>(old, now, before_rounding, STRIDE, totals);
    }
    if (ZO_RARELY(ragged)) std::memcpy(weights, buffer + skip, count * sizeof(Storage));
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
