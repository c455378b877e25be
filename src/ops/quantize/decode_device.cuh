// Device decoders: eight e2m1 or four e4m3 at a time to bf16, exactly.
#pragma once

#include <cstdint>

#include "gpu/ptx/convert.cuh"

namespace dsv4 {

// Eight nibbles -> four bf16 pairs in order, each value times 2^-126.
//
// e2m1's three magnitude bits, put where bf16 has the lowest two exponent bits and the highest mantissa bit, are the same
// number 2^126 times smaller; subnormals line up too. Nibbles i and i + 4 move together: they are 16 bits apart already.
__device__ __forceinline__ void place_e2m1x8(uint32_t codes, uint32_t (&pairs)[4]) {
  uint32_t spread[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t top = codes << (12 - 4 * i);
    spread[i] = (top & 0x80008000u) | ((top >> 6) & 0x01c001c0u);
  }
  pairs[0] = ptx::permute_bytes(spread[0], spread[1], 0x5410);
  pairs[1] = ptx::permute_bytes(spread[2], spread[3], 0x5410);
  pairs[2] = ptx::permute_bytes(spread[0], spread[1], 0x7632);
  pairs[3] = ptx::permute_bytes(spread[2], spread[3], 0x7632);
}

constexpr uint32_t kBf16x2TwoPow126 = 0x7e807e80u;
constexpr uint32_t kBf16x2TwoPow120 = 0x7b807b80u;

// ue4m3 -> the same value in both halves; 0x7f -> NaN.
__device__ __forceinline__ uint32_t decode_ue4m3_bf16x2(uint32_t code) {
  return code == 0x7fu ? 0x7fc07fc0u : ptx::mul_bf16x2(code * 0x00100010u, kBf16x2TwoPow120);
}

// e2m1 * sf, exact: bf16 pairs in order. scale: decode_ue4m3_bf16x2(sf).
__device__ __forceinline__ void decode_nvfp4x8(uint32_t codes, uint32_t scale, uint32_t (&pairs)[4]) {
  place_e2m1x8(codes, pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = ptx::mul_bf16x2(ptx::mul_bf16x2(pairs[i], kBf16x2TwoPow126), scale);
}
__device__ __forceinline__ void decode_nvfp4x16(uint2 codes, uint32_t sf, uint32_t (&pairs)[8]) {
  const uint32_t scale = decode_ue4m3_bf16x2(sf);
  uint32_t half[4];
  decode_nvfp4x8(codes.x, scale, half);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = half[i];
  decode_nvfp4x8(codes.y, scale, half);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[4 + i] = half[i];
}

// Four e4m3 times a binary32 scale, rounded once to bf16. NaN codes give NaN.
__device__ __forceinline__ uint2 decode_e4m3x4_bf16(uint32_t codes, float scale) {
  const float2 a = ptx::cvt_f32_f16x2(ptx::cvt_f16x2_e4m3x2(codes & 0xffffu));
  const float2 b = ptx::cvt_f32_f16x2(ptx::cvt_f16x2_e4m3x2(codes >> 16));
  return {ptx::cvt_bf16x2(a.x * scale, a.y * scale), ptx::cvt_bf16x2(b.x * scale, b.y * scale)};
}

}  // namespace dsv4
