// Clamped SwiGLU in binary32 with one defined sequence of rounded operations: every backend gives the same bits.
//
// h = rho * ((g / (1 + exp(-g))) * u), g = min(g, limit), u = clamp(u, -limit, limit). exp is the polynomial below and not
// the library's: library versions differ in the last bit, and in a4 a last bit moves an e2m1 code. No operation is fused
// (-ffp-contract=off, --fmad=false); division is IEEE. Vector versions repeat these lines operation by operation.
// Error of swiglu_exp against e^t: below 1.5 units in the last place on [-87, 88] (tests/ops/moe_test.cpp).
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace dsv4 {

namespace swiglu_constants {
constexpr float kMinT = -87.0f, kMaxT = 88.0f;  // e^t stays a normal binary32 number
constexpr float kLog2e = 1.44269504f;
constexpr float kRoundMagic = 12582912.0f;      // 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr float kLn2High = 0.693359375f;        // 10 significant bits: n * kLn2High is exact for |n| <= 2^13
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kC7 = 1.9841270e-4f, kC6 = 1.3888889e-3f, kC5 = 8.3333338e-3f, kC4 = 4.1666668e-2f, kC3 = 1.6666667e-1f, kC2 = 0.5f;
}  // namespace swiglu_constants

DSV4_HD constexpr float swiglu_exp(float t) {
  namespace c = swiglu_constants;
  t = t > c::kMaxT ? c::kMaxT : t;
  t = t < c::kMinT ? c::kMinT : t;
  const float shifted = t * c::kLog2e + c::kRoundMagic;
  const float n = shifted - c::kRoundMagic;
  float r = t - n * c::kLn2High;
  r = r - n * c::kLn2Low;
  float p = c::kC7;
  p = p * r + c::kC6;
  p = p * r + c::kC5;
  p = p * r + c::kC4;
  p = p * r + c::kC3;
  p = p * r + c::kC2;
  p = p * (r * r) + r;
  p = p + 1.0f;
  // shifted holds n in its low mantissa bits: moving them to the exponent gives 2^n (n in -126..127).
  const uint32_t power = (detail::float_bits(shifted) - detail::float_bits(c::kRoundMagic) + 127u) << 23;
  return p * detail::bits_float(power);
}

DSV4_HD constexpr float silu(float g) { return g / (1.0f + swiglu_exp(-g)); }

// rho = 1 for the shared expert: the multiplication changes nothing.
DSV4_HD constexpr float swiglu(float g, float u, float rho, float limit) {
  g = g > limit ? limit : g;
  u = u > limit ? limit : u;
  u = u < -limit ? -limit : u;
  return rho * (silu(g) * u);
}

}  // namespace dsv4
