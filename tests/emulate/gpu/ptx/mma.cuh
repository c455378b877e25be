// Stands in for src/gpu/ptx/mma.cuh.
#pragma once

#include "gpu/ptx/convert.cuh"

namespace dsv4::ptx {

inline void mma_m16n8k16_bf16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulate::LaneWords& lanes = emulate::exchange(own, 6);
  const auto half = [](uint64_t pair, int which) {
    return which ? high_bf16(static_cast<uint32_t>(pair)) : low_bf16(static_cast<uint32_t>(pair));
  };
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, upper = k / 8;
      sum += static_cast<double>(half(lanes[row % 8 * 4 + pair][row / 8 + 2 * upper], k % 2)) *
             half(lanes[col * 4 + pair][4 + upper], k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

inline void need_here(uint32_t) {}

}  // namespace dsv4::ptx
