// Stands in for src/gpu/fast_div.h.
#pragma once

#include <cstdint>

namespace dsv4::gpu {

struct FastDiv {
  uint32_t divisor = 1;
  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d) {}
  uint32_t quotient(uint32_t n) const { return n / divisor; }
};

}  // namespace dsv4::gpu
