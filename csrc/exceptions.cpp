#include "exceptions.h"

#include <cstring>

#include "dispatch.h"

namespace zo {

size_t Exceptions::bytes() const {
  if (!data_) return 0;
  if (copied_) return copied_;
  return strays_ * sizeof(Stray) + escapes_ * sizeof(uint32_t) + codes_ + SLACK;
}

void* Exceptions::make_copy(size_t bytes) {
  data_.reset(new uint8_t[bytes]);
  strays_ = escapes_ = codes_ = 0;
  copied_ = static_cast<uint32_t>(bytes);
  return data_.get();
}

void Exceptions::set(const Stray* strays, size_t stray_count, const uint32_t* escapes,
                     size_t escape_count, const uint8_t* codes, size_t code_count) {
  copied_ = 0;
  strays_ = static_cast<uint32_t>(stray_count);
  escapes_ = static_cast<uint32_t>(escape_count);
  codes_ = static_cast<uint32_t>(code_count);
  const size_t stray_bytes = stray_count * sizeof(Stray);
  const size_t escape_bytes = escape_count * sizeof(uint32_t);
  data_.reset(new uint8_t[stray_bytes + escape_bytes + code_count + SLACK]);
  uint8_t* at = data_.get();
  std::memcpy(at, strays, stray_bytes);
  std::memcpy(at + stray_bytes, escapes, escape_bytes);
  std::memcpy(at + stray_bytes + escape_bytes, codes, code_count);
  std::memset(at + stray_bytes + escape_bytes + code_count, 0, SLACK);
}

Collected& collected() {
  thread_local Collected lists;
  if (lists.codes.empty()) {
    lists.codes.resize(PIECE + Exceptions::SLACK);
    lists.escapes.resize(PIECE);
    lists.strays.resize(PIECE);
  }
  return lists;
}

}  // namespace zo
