// What gives perturbed weights back exactly (swap.h), one Exceptions per piece of a tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace zo {

// An element that is kept with its place in the piece; bits is the pattern as binary32.
struct Stray {
  uint32_t place, bits;
};

// Either a copy of the piece's weights, or three lists in the order of the elements. Those among
// them that are flagged, which v and z tell, have a code each: 255 for one whose whole value is
// the next of the escapes. Strays are those that neither flag nor code gives back.
class Exceptions {
 public:
  bool is_copy() const { return copied_ != 0; }
  const void* copy() const { return data_.get(); }
  const Stray* strays() const { return reinterpret_cast<const Stray*>(data_.get()); }
  const uint32_t* escapes() const {
    return reinterpret_cast<const uint32_t*>(data_.get() + strays_ * sizeof(Stray));
  }
  const uint8_t* codes() const {
    return data_.get() + strays_ * sizeof(Stray) + escapes_ * sizeof(uint32_t);
  }
  uint32_t stray_count() const { return strays_; }
  size_t bytes() const;

  // Room for a copy of so many bytes, to be filled by the caller.
  void* make_copy(size_t bytes);
  void set(const Stray* strays, size_t stray_count, const uint32_t* escapes, size_t escape_count,
           const uint8_t* codes, size_t code_count);

  // Kernels read codes a vector at a time.
  static constexpr size_t SLACK = 16;

 private:
  std::unique_ptr<uint8_t[]> data_;
  uint32_t strays_ = 0, escapes_ = 0, codes_ = 0, copied_ = 0;
};

// The exceptions of all pieces of a run, in its order.
struct Store {
  std::vector<Exceptions> pieces;
};

// Where a thread collects a piece's exceptions before their number is known.
struct Collected {
  std::vector<uint8_t> codes;
  std::vector<uint32_t> escapes;
  std::vector<Stray> strays;
};
Collected& collected();

}  // namespace zo
