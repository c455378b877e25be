// Packed e4m3 words -> BF16 fragment registers, exactly: 7 logic operations and 2 multiplications per four weights.
#pragma once

#include <cstdint>

#include "ops/moe/moe_decode_sm90.cuh"

namespace dsv4::sm90 {

// Columns 4 s .. 4 s + 3 of a row: out[0] the first two, out[1] the next two.
__device__ __forceinline__ void decode_fp8_word(uint32_t word, uint32_t factor, uint32_t (&out)[2]) {
  const uint32_t first = ((word << 8) & 0x80008000u) | ((word << 4) & 0x07f007f0u);
  const uint32_t second = (word & 0x80008000u) | ((word >> 4) & 0x07f007f0u);
  out[0] = mul_bf16x2(first, factor);
  out[1] = mul_bf16x2(second, factor);
}

// A thread's share of one m64k64 block: fragments of its four k16 steps, in the order of decode_block.
__device__ __forceinline__ void decode_fp8_block(const uint4& low_row, const uint4& high_row, uint32_t factor_low, uint32_t factor_high,
                                                 uint32_t (&a)[4][4]) {
  const uint32_t low[4] = {low_row.x, low_row.y, low_row.z, low_row.w}, high[4] = {high_row.x, high_row.y, high_row.z, high_row.w};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t r[2];
    decode_fp8_word(low[step], factor_low, r);
    a[step][0] = r[0], a[step][2] = r[1];
    decode_fp8_word(high[step], factor_high, r);
    a[step][1] = r[0], a[step][3] = r[1];
  }
}

}  // namespace dsv4::sm90
