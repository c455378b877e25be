// FP8 (e4m3) with block scales: the 128x128 weight blocks, and the simulated quantisers of DeepSeek-V4.
//
// FP8 block quantiser ("act_quant"): s = 2^ceil(log2(max(amax, 1e-4) * (1/448))), ceil-log2 on the bit pattern;
//   q = e4m3(clamp(x / s, -448, 448)); round trip = bf16(q * s). 64-blocks on the 448 nope channels of KV rows,
//   128-blocks for FP8 linears.
// FP4 block quantiser ("fp4_act_quant"): 32-blocks, s = 2^ceil(log2(max(amax, 6 * 2^-126) * (1/6))), e2m1; indexer only.
// Both scales are powers of two, so they are stored as ue8m0 and q * s is exact in bf16.
#pragma once

#include <cstdint>

#include "codec/e2m1.h"
#include "codec/e4m3.h"
#include "codec/nvfp4.h"
#include "codec/ue8m0.h"

namespace dsv4 {

constexpr int kFp8WeightBlock = 128;  // both dimensions
constexpr int kFp8KvBlock = 64;
constexpr int kFp4IndexBlock = 32;

// ue8m0 byte of the scale for a block with this amax. A NaN amax counts as the floor; an infinite one has no scale
// (byte 0xff, NaN), so the block decodes to NaN.
DSV4_HD constexpr uint8_t fp8_block_scale(float amax) {
  const float floored = amax > 1e-4f ? amax : 1e-4f;
  return static_cast<uint8_t>(ceil_log2(floored * (1.0f / 448.0f)) + 127);
}
DSV4_HD constexpr uint8_t fp4_block_scale(float amax) {
  const float floored = amax > 6.0f * 0x1p-126f ? amax : 6.0f * 0x1p-126f;
  return static_cast<uint8_t>(ceil_log2(floored * (1.0f / 6.0f)) + 127);
}

// x / s as the quantisers compute it (s a power of two: exact outside the subnormal range); encode_* saturates.
DSV4_HD constexpr uint8_t encode_fp8_block_element(float x, uint8_t scale) {
  return encode_e4m3(x / decode_ue8m0(scale));
}
DSV4_HD constexpr uint8_t encode_fp4_block_element(float x, uint8_t scale) {
  return encode_e2m1(x / decode_ue8m0(scale));
}

DSV4_HD constexpr float decode_fp8_block_element(uint8_t code, uint8_t scale) {
  return decode_e4m3(code) * decode_ue8m0(scale);
}
DSV4_HD constexpr float decode_fp4_block_element(uint8_t code, uint8_t scale) {
  return decode_e2m1(code) * decode_ue8m0(scale);
}

}  // namespace dsv4
