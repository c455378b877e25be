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

// A thread's share of half a block: fragments of its two k16 steps, in the order of decode_half_block. factors: the two bytes of
// moe_shared_sm90.h.
__device__ __forceinline__ void decode_fp8_half_block(const uint4& words, uint32_t factors, uint32_t (&a)[2][4]) {
  const uint32_t low = (factors & 0xff) * 0x00800080u,
                 high = (factors >> 8) * 0x00800080u;  // two bf16 of that exponent
  uint32_t r[2];
  decode_fp8_word(words.x, low, r);
  a[0][0] = r[0], a[0][2] = r[1];
  decode_fp8_word(words.y, low, r);
  a[1][0] = r[0], a[1][2] = r[1];
  decode_fp8_word(words.z, high, r);
  a[0][1] = r[0], a[0][3] = r[1];
  decode_fp8_word(words.w, high, r);
  a[1][1] = r[0], a[1][3] = r[1];
}

}  // namespace dsv4::sm90
