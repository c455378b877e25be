// Device encoders: eight values at a time to e2m1 and e4m3, with exactly the bytes of codec/*.h.
#pragma once

#include <cstdint>

#include "codec/e2m1.h"
#include "codec/e4m3.h"
#include "codec/nvfp4.h"
#include "gpu/ptx/convert.cuh"

namespace dsv4 {

// 1 / d rounded to nearest, for 2^-100 <= d <= 2^117: one Newton step on the hardware's approximation (tests/gpu tries every such d).
__device__ __forceinline__ float rcp_rn_normal(float d) {
  const float approximate = ptx::rcp_approx_ftz(d);
  return __fmaf_rn(approximate, __fmaf_rn(-d, approximate, 1.0f), approximate);
}

// Largest |x|, NaN ignored; *has_nan says whether there was one.
template <int kCount>
__device__ __forceinline__ float amax_of(const float (&x)[kCount], bool* has_nan) {
  float amax = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) amax = ptx::max_nan(amax, fabsf(x[i]));
  *has_nan = isnan(amax);
  if (*has_nan) {
    amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) amax = fmaxf(amax, fabsf(x[i]));
  }
  return amax;
}

// Magnitude code of a = |y| < 7 in the low byte of the result.
//
// Adding 2^22 (2^23, 2^24) rounds to the steps .5 (1, 2) of [0, 2), [2, 4), [4, 8), to nearest with ties to the even code, and
// leaves the step count in the low mantissa bits; 2 and 4 further units in the last place turn counts into codes. The three
// constants are 0x00800002 apart, so a's exponent (at least that of 1) picks one by a multiplication.
__device__ __forceinline__ uint32_t e2m1_magnitude(float a) {
  const uint32_t exponent = __float_as_uint(fmaxf(a, 1.0f)) >> 23;
  const uint32_t magic = exponent * 0x00800002u + (0x4a800000u - 127u * 0x00800002u);
  return __float_as_uint(__fadd_rn(a, __uint_as_float(magic)));
}

// x[i] * multiplier -> 8 nibbles, element 0 lowest. No product is NaN and all are below 7 in magnitude; multiplier >= 0.
__device__ __forceinline__ uint32_t encode_small_e2m1x8(const float* x, float multiplier) {
  if constexpr (ptx::kHasCvtE2m1) {
    uint32_t result = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      result |= ptx::cvt_e2m1x2(__fmul_rn(x[2 * j], multiplier), __fmul_rn(x[2 * j + 1], multiplier)) << (8 * j);
    return result;
  } else {
    uint32_t pair[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t even = e2m1_magnitude(fabsf(__fmul_rn(x[2 * j], multiplier)));
      const uint32_t odd = e2m1_magnitude(fabsf(__fmul_rn(x[2 * j + 1], multiplier)));
      pair[j] = odd * 16u + even;  // only the low byte counts
    }
    const uint32_t low = ptx::permute_bytes(pair[0], pair[1], 0x0040);
    const uint32_t high = ptx::permute_bytes(pair[2], pair[3], 0x0040);
    const uint32_t magnitudes = ptx::permute_bytes(low, high, 0x5410);
    // Sign bits: the top byte of every value, even ones four bits down.
    const auto top = [&](int i) { return __float_as_uint(x[i]); };
    const uint32_t even_signs = ptx::permute_bytes(ptx::permute_bytes(top(0), top(2), 0x0073),
                                                   ptx::permute_bytes(top(4), top(6), 0x0073), 0x5410);
    const uint32_t odd_signs = ptx::permute_bytes(ptx::permute_bytes(top(1), top(3), 0x0073),
                                                  ptx::permute_bytes(top(5), top(7), 0x0073), 0x5410);
    return (magnitudes & 0x77777777u) | (odd_signs & 0x80808080u) | ((even_signs >> 4) & 0x08080808u);
  }
}

// The same for any x and multiplier >= 0 or NaN.
__device__ __forceinline__ uint32_t encode_any_e2m1x8(const float* x, float multiplier) {
  if constexpr (ptx::kHasCvtE2m1) return encode_small_e2m1x8(x, multiplier);
  uint32_t result = 0;
#pragma unroll  // a rolled loop would index x and move it to local memory for every vector
  for (int i = 0; i < 8; ++i) result |= static_cast<uint32_t>(encode_e2m1(__fmul_rn(x[i], multiplier))) << (4 * i);
  return result;
}

// x[0..15] * multiplier -> 16 nibbles; amax: largest |x|, NaN ignored; has_nan: x holds one.
__device__ __forceinline__ uint2 encode_e2m1x16(const float (&x)[16], float multiplier, float amax, bool has_nan) {
  if (!has_nan && __fmul_rn(amax, multiplier) < 7.0f)
    return {encode_small_e2m1x8(x, multiplier), encode_small_e2m1x8(x + 8, multiplier)};
  return {encode_any_e2m1x8(x, multiplier), encode_any_e2m1x8(x + 8, multiplier)};
}

// x[i] * factor -> 8 bytes, element 0 lowest.
__device__ __forceinline__ uint2 encode_e4m3x8(const float* x, float factor) {
  uint32_t pair[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) pair[j] = ptx::cvt_e4m3x2(__fmul_rn(x[2 * j], factor), __fmul_rn(x[2 * j + 1], factor));
  return {pair[0] | pair[1] << 16, pair[2] | pair[3] << 16};
}

// encode_ue4m3 of a non-negative number (or NaN), in hardware.
__device__ __forceinline__ uint32_t encode_ue4m3_device(float x) { return ptx::cvt_e4m3x2(x, 0.0f) & 0x7fu; }

// decode_ue4m3 for codes 0..0x7e.
__device__ __forceinline__ float decode_ue4m3_device(uint32_t code) {
  return __fmul_rn(__uint_as_float(code << 20), 0x1p120f);
}

// The scale byte of a 16-group and what its elements are multiplied by: the run-time rule.
struct Nvfp4GroupScale {
  uint32_t sf;
  float multiplier;
};
__device__ __forceinline__ Nvfp4GroupScale nvfp4_group_scale(float amax16, float global, float rcp6) {
  Nvfp4GroupScale scale;
  scale.sf = encode_ue4m3_device(__fmul_rn(amax16, rcp6));
  const float divisor =
      __fmul_rn(scale.sf == 0x7f ? __uint_as_float(0x7fc00000u) : decode_ue4m3_device(scale.sf), global);
  scale.multiplier = scale.sf == 0 ? 0.0f : __frcp_rn(divisor);
  return scale;
}

// The same without branches, for amax16 that is no NaN, rcp6 = nvfp4_rcp6(global) and a global that nvfp4_global_is_plain.
__device__ __forceinline__ Nvfp4GroupScale nvfp4_plain_group_scale(float amax16, float global, float rcp6) {
  Nvfp4GroupScale scale;
  scale.sf = encode_ue4m3_device(__fmul_rn(amax16, rcp6));
  const float multiplier = rcp_rn_normal(__fmul_rn(decode_ue4m3_device(scale.sf), global));
  scale.multiplier = scale.sf == 0 ? 0.0f : multiplier;
  return scale;
}
// sf * global and its reciprocal are normal for every sf.
__device__ __forceinline__ bool nvfp4_global_is_plain(float global) { return global >= 0x1p-60f && global <= 0x1p60f; }

// 2^-(byte - 127), byte as fp8_block_scale makes it (105..247), or NaN for 0xff.
__device__ __forceinline__ float rcp_ue8m0(uint32_t byte) {
  return byte == 0xff ? __uint_as_float(0x7fc00000u) : __uint_as_float((254u - byte) << 23);
}

}  // namespace dsv4
