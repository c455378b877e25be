// Where a role stands in a ring of stages guarded by mbarriers: the stage, and the parity of the phase it waits for there.
#pragma once

#include <cstdint>

namespace dsv4::sm90 {

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

}  // namespace dsv4::sm90
