// Single operations of the wrapper that ZO_SIMD names, over arrays whose lengths are multiples of
// W, for test_emulated_lanes.py.
#include <cstddef>
#include <cstdint>

#include ZO_SIMD

namespace {

template <class Operation>
void each(const uint32_t* a, uint32_t* out, size_t count, Operation operation) {
  for (size_t i = 0; i < count; i += W) store_u32(out + i, operation(load_u32(a + i)));
}

template <class Operation>
void each(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count, Operation operation) {
  for (size_t i = 0; i < count; i += W)
    store_u32(out + i, operation(load_u32(a + i), load_u32(b + i)));
}

}  // namespace

extern "C" {

uint32_t width() { return W; }
uint32_t all_lanes() { return ALL_LANES; }

void maxima(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, max_u32);
}
void minima(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, min_u32);
}
void smaller(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, less);
}
void equals(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, equal);
}
void copies(const uint32_t* a, uint32_t* out, size_t count) {
  each(a, out, count, [](VI x) { return x; });
}
// The shifts by 0 are those that binary32 weights ask for.
void left_0(const uint32_t* a, uint32_t* out, size_t count) { each(a, out, count, sll<0>); }
void right_0(const uint32_t* a, uint32_t* out, size_t count) { each(a, out, count, sra<0>); }
void right_5(const uint32_t* a, uint32_t* out, size_t count) { each(a, out, count, sra<5>); }
void right_8(const uint32_t* a, uint32_t* out, size_t count) { each(a, out, count, sra<8>); }
void right_13(const uint32_t* a, uint32_t* out, size_t count) { each(a, out, count, sra<13>); }
void right_16(const uint32_t* a, uint32_t* out, size_t count) { each(a, out, count, sra<16>); }
void halves(const uint32_t* a, uint32_t* out, size_t count) {
  each(a, out, count, [](VI x) { return bits(round_f16(from_bits(x))); });
}

void signed_maxima(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, max_s32);
}
void signed_minima(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, min_s32);
}
void half_maxima(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, max_s16);
}
void half_minima(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, min_s16);
}
void half_orders(const uint32_t* a, uint32_t* out, size_t count) {
  each(a, out, count, ordered_16);
}
void above_as_floats(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, [](VI x, VI y) { return above(from_bits(x), from_bits(y)); });
}
void quotients(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, [](VI x, VI y) { return bits(div(from_bits(x), from_bits(y))); });
}
// a where the lanes of less(a, b) are set, else b.
void picked(const uint32_t* a, const uint32_t* b, uint32_t* out, size_t count) {
  each(a, b, out, count, [](VI x, VI y) { return pick(less(x, y), x, y); });
}

// One number for each vector.
void highests(const uint32_t* a, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; i += W)
    out[i / W] = static_cast<uint32_t>(highest(load_u32(a + i)));
}
void lowests(const uint32_t* a, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; i += W) out[i / W] = static_cast<uint32_t>(lowest(load_u32(a + i)));
}

// The element of eight that each lane of a names by its low three bits.
void chosen(const float* eight, const uint32_t* a, uint32_t* out, size_t count) {
  const Eight table = load_eight(eight);
  each(a, out, count, [&](VI x) { return bits(at(table, and_(x, splat(7u)))); });
}
// Of vectors of 16-bit lanes: what stands where each lane ends in a tree that is moved.
void searched(const int16_t* tree, const int16_t* steps, int times, const int16_t* outcomes,
              const uint32_t* a, uint32_t* out, size_t count) {
  const Tree moved = make_tree(add_scaled(load_sixteen(tree), load_sixteen(steps), times));
  const Outcomes table = make_outcomes(load_sixteen(outcomes));
  each(a, out, count, [&](VI x) { return at(table, descend(moved, x)); });
}
// One number for each vector.
void any_bits(const uint32_t* a, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; i += W) out[i / W] = any_bit(load_u32(a + i));
}

// One mask for each vector.
void masks(const uint32_t* a, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; i += W) out[i / W] = mask_of(load_u32(a + i));
}

// A vector and a mask for each row; rows of bytes are 2 W long.
void compress(const uint32_t* a, const uint32_t* mask, uint8_t* out, size_t rows) {
  for (size_t i = 0; i < rows; ++i) compress_bytes(out + 2 * W * i, load_u32(a + W * i), mask[i]);
}
void expand(const uint8_t* bytes, const uint32_t* mask, uint32_t* out, size_t rows) {
  for (size_t i = 0; i < rows; ++i)
    store_u32(out + W * i, expand_bytes(bytes + 2 * W * i, mask[i]));
}
}
