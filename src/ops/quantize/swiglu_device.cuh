// Clamped SwiGLU on the device: the bits of ops/moe/swiglu.h with fewer instructions. For epilogues and the stand-alone kernel.
#pragma once

#include "gpu/ptx/convert.cuh"
#include "ops/moe/swiglu.h"

namespace dsv4 {

// silu(g) for g <= 80, bit for bit.
//
// Replaced: t - n * kLn2High by one fused operation (the product is exact); p * 2^n by an addition to the exponent (p is in
// (0.7, 1.5), the product normal); IEEE division by a corrected reciprocal, which rounds correctly while nothing leaves the
// normal range. Where g is tiny, zero or below -80 the defining function is called. tests/gpu checks all 65536 bf16 inputs.
__device__ __forceinline__ float silu_device(float g) {
  namespace c = swiglu_constants;
  const float magnitude = fabsf(g);
  if (!(magnitude > 0x1p-90f && magnitude <= 80.0f)) return silu(g);
  const float t = -g;
  const float shifted = t * c::kLog2e + c::kRoundMagic;
  const float n = shifted - c::kRoundMagic;
  float r = __fmaf_rn(-n, c::kLn2High, t);
  r = r - n * c::kLn2Low;
  float p = c::kC7;
  p = p * r + c::kC6;
  p = p * r + c::kC5;
  p = p * r + c::kC4;
  p = p * r + c::kC3;
  p = p * r + c::kC2;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const float e = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
  const float d = 1.0f + e;
  const float approximate = ptx::rcp_approx(d);
  const float reciprocal = __fmaf_rn(approximate, __fmaf_rn(-d, approximate, 1.0f), approximate);
  const float quotient = g * reciprocal;
  return __fmaf_rn(__fmaf_rn(-d, quotient, g), reciprocal, quotient);
}

__device__ __forceinline__ float swiglu_device(float g, float u, float rho, float limit) {
  g = ptx::min_nan(g, limit);
  u = ptx::max_nan(ptx::min_nan(u, limit), -limit);
  return rho * (silu_device(g) * u);
}

}  // namespace dsv4
