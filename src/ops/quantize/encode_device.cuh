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

// Magnitude code of a = |y| < 7 in the low byte of the result, for values that come one at a time.
//
// Adding 2^22 (2^23, 2^24) rounds to the steps .5 (1, 2) of [0, 2), [2, 4), [4, 8), to nearest with ties to the even code, and
// leaves the step count in the low mantissa bits; 2 and 4 further units in the last place turn counts into codes. The three
// constants are 0x00800002 apart, so a's exponent (at least that of 1) picks one by a multiplication.
__device__ __forceinline__ uint32_t e2m1_magnitude(float a) {
  const uint32_t exponent = __float_as_uint(fmaxf(a, 1.0f)) >> 23;
  const uint32_t magic = exponent * 0x00800002u + (0x4a800000u - 127u * 0x00800002u);
  return __float_as_uint(__fadd_rn(a, __uint_as_float(magic)));
}

// encode_small_e2m1x8 wants multipliers times this: without conversions to e2m1, its 1 stands at the smallest normal e4m3, whose code
// is then four times e2m1's.
inline constexpr float kSmallE2m1Scale = ptx::kHasCvtE2m1 ? 1.0f : 0x1p-6f;

// |x * multiplier| rounded to the numbers of e2m1, both times 2^-6. The product is below 7 (times 2^-6); multiplier >= 0.
//
// a - 2^22 t is rounded to steps of half of t's power of two: two significant bits of a, and from 1.5 downwards steps of .5. It is exact up
// to that rounding, which goes to nearest, and ties to the even code: 2^22 t is a multiple of the step, an even one where there is a tie
// (t = a has three significant bits there, or is 1.5). The difference, not the sum: it leaves the binade of 2^22 t only next to a power of
// two, where finer steps give that power as well.
__device__ __forceinline__ float round_small_e2m1(float x, float multiplier) {
  const float a = __fmul_rn(fabsf(x), multiplier), t = fmaxf(a, 1.5f * 0x1p-6f);
  return __fmaf_rn(t, 0x1p22f, __fmaf_rn(t, -0x1p22f, a));
}

// Four bytes with the signs of x[0..3] in their top bits.
__device__ __forceinline__ uint32_t signs_of_floats(const float* x) {
  return ptx::cvt_e4m3x2(x[0], x[1]) | ptx::cvt_e4m3x2(x[2], x[3]) << 16;
}
__device__ __forceinline__ uint32_t signs_of_pairs(uint32_t low, uint32_t high) {
  return ptx::permute_bytes(low, high, 0x7531);
}

// x[0..3] * multiplier -> nibbles: elements 0, 1 in byte 1 of the result, 2, 3 in byte 3; as round_small_e2m1.
__device__ __forceinline__ uint32_t small_e2m1_in_odd_bytes(const float* x, float multiplier, uint32_t signs) {
  const auto pair = [&](int i) {
    return ptx::cvt_e4m3x2(round_small_e2m1(x[i], multiplier), round_small_e2m1(x[i + 1], multiplier));
  };
  const uint32_t upper_nibbles = (pair(0) | pair(2) << 16) * 4u | (signs & 0x80808080u);  // of four bytes
  return upper_nibbles * 17u;
}

// x[i] * multiplier / kSmallE2m1Scale -> 8 nibbles, element 0 lowest. No product is NaN, all are below 7 in magnitude; multiplier >= 0.
// signs: of four elements each, as above.
__device__ __forceinline__ uint32_t encode_small_e2m1x8(const float* x, float multiplier, uint32_t low_signs,
                                                        uint32_t high_signs) {
  if constexpr (ptx::kHasCvtE2m1) {
    uint32_t result = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      result |= ptx::cvt_e2m1x2(__fmul_rn(x[2 * j], multiplier), __fmul_rn(x[2 * j + 1], multiplier)) << (8 * j);
    return result;
  } else {
    return ptx::permute_bytes(small_e2m1_in_odd_bytes(x, multiplier, low_signs),
                              small_e2m1_in_odd_bytes(x + 4, multiplier, high_signs), 0x7531);
  }
}

// The same for any x and multiplier >= 0 or NaN.
__device__ __forceinline__ uint32_t encode_any_e2m1x8(const float* x, float multiplier) {
  if constexpr (ptx::kHasCvtE2m1) return encode_small_e2m1x8(x, multiplier, 0, 0);
  uint32_t result = 0;
#pragma unroll  // a rolled loop would index x and move it to local memory for every vector
  for (int i = 0; i < 8; ++i) result |= static_cast<uint32_t>(encode_e2m1(__fmul_rn(x[i], multiplier))) << (4 * i);
  return result;
}

// x[0..15] * multiplier -> 16 nibbles; multiplier at least 2^-100, 0 or NaN; amax: largest |x|, NaN ignored; has_nan: x holds one.
__device__ __forceinline__ uint2 encode_e2m1x16(const float (&x)[16], float multiplier, float amax, bool has_nan) {
  const float small = __fmul_rn(multiplier, kSmallE2m1Scale);
  if (!has_nan && __fmul_rn(amax, small) < 7.0f * kSmallE2m1Scale)
    return {encode_small_e2m1x8(x, small, signs_of_floats(x), signs_of_floats(x + 4)),
            encode_small_e2m1x8(x + 8, small, signs_of_floats(x + 8), signs_of_floats(x + 12))};
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

// The same without branches, for amax16 that is no NaN, rcp6 = nvfp4_rcp6(global) and a global that nvfp4_global_is_plain; the
// multiplier times kSmallE2m1Scale.
__device__ __forceinline__ Nvfp4GroupScale nvfp4_plain_group_scale(float amax16, float global, float rcp6) {
  Nvfp4GroupScale scale;
  scale.sf = encode_ue4m3_device(__fmul_rn(amax16, rcp6));
  const float decoded = __fmul_rn(__uint_as_float(scale.sf << 20), 0x1p120f / kSmallE2m1Scale),
              multiplier = rcp_rn_normal(__fmul_rn(decoded, global));
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
