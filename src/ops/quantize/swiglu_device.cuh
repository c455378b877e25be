// Clamped SwiGLU on the device: the bits of ops/moe/swiglu.h with fewer instructions. For epilogues and the stand-alone kernel.
#pragma once

#include "ops/moe/swiglu.h"
#include "ops/quantize/encode_device.cuh"

namespace dsv4 {

// silu(g) for g >= -80, or NaN; x = min(g, 80).
__device__ __forceinline__ float silu_device(float g, float x) {
  namespace c = swiglu_constants;
  const float shifted = __fmaf_rn(x, -c::kLog2e, c::kRoundMagic);
  const float n = shifted - c::kRoundMagic;
  const float r = __fmaf_rn(n, c::kLn2, x);
  float p = __fmaf_rn(c::kC6, r, c::kC5);
  p = __fmaf_rn(p, r, c::kC4);
  p = __fmaf_rn(p, r, c::kC3);
  p = __fmaf_rn(p, r, c::kC2);
  p = __fmaf_rn(p, r, -1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  const float d = __fmaf_rn(p, __uint_as_float(__float_as_uint(shifted) << 23), 1.0f);
  return g * rcp_rn_normal(d);
}
// g in [-80, 80], or NaN.
__device__ __forceinline__ float silu_device(float g) { return silu_device(g, g); }

// limit: at most 80.
__device__ __forceinline__ float swiglu_device(float g, float u, float rho, float limit) {
  g = ptx::max_nan(ptx::min_nan(g, limit), -swiglu_constants::kMaxGate);
  u = ptx::max_nan(ptx::min_nan(u, limit), -limit);
  return rho * (silu_device(g) * u);
}

// Any limit.
__device__ __forceinline__ float swiglu_device_unlimited(float g, float u, float rho, float limit) {
  g = ptx::max_nan(ptx::min_nan(g, limit), -swiglu_constants::kMaxGate);
  u = ptx::max_nan(ptx::min_nan(u, limit), -limit);
  return rho * (silu_device(g, ptx::min_nan(g, swiglu_constants::kMaxGate)) * u);
}

}  // namespace dsv4
