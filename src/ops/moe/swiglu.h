// Clamped SwiGLU in binary32 with one defined sequence of rounded operations: every backend gives the same bits.
//
//   h = rho * (silu(g) * u), g = max(min(g, limit), -80), u = clamp(u, -limit, limit); silu(g) = g * (1 / (1 + e^-g))
//
// e^-g is the polynomial below and not the library's: library versions differ in the last bit, and in a4 a last bit moves an e2m1
// code. Where std::fma stands there is one rounding, elsewhere one per operation (-ffp-contract=off, --fmad=false); 1 / x is IEEE.
// Vector and device versions repeat these lines operation by operation. The reciprocal is a value of its own, not part of a
// division: a GPU has it in three instructions. Gates below -80 count as -80: silu(-80) = -1.4e-33, and d stays far from overflow.
// Error of silu against g / (1 + e^-g), in units in the last place (tests/ops/moe_test.cpp): all bf16 gates from -32 on 2.2, dense
// binary32 from -20 on 3.4; it grows to 6 at -80, where silu is -1.4e-33: ln 2 is one constant there, 2^-29 off, times n.
#pragma once

#include <cmath>
#include <cstdint>

#include "codec/bf16.h"

namespace dsv4 {

namespace swiglu_constants {
constexpr float kMaxGate = 80.0f;
constexpr float kLog2e = 1.44269504f;
// 1.5 * 2^23 + 127: adding it rounds to an integer n, ties to even, and leaves n + 127 in the low bits.
constexpr float kRoundMagic = 12583039.0f;
constexpr float kLn2 = 0.693147182f;
// e^-r on |r| <= ln(2) / 2, relative error below 2^-28 (Remez, 1 and -1 fixed)
constexpr float kC6 = 1.38145406e-3f, kC5 = -8.36874545e-3f, kC4 = 4.16683890e-2f, kC3 = -1.66665211e-1f,
                kC2 = 4.99999940e-1f;
}  // namespace swiglu_constants

// g >= -80 or NaN.
DSV4_HD inline float silu(float g) {
  namespace c = swiglu_constants;
  const float x = g > c::kMaxGate ? c::kMaxGate : g;
  const float shifted = std::fma(x, -c::kLog2e, c::kRoundMagic);
  const float n = shifted - c::kRoundMagic;
  const float r = std::fma(n, c::kLn2, x);
  float p = std::fma(c::kC6, r, c::kC5);
  p = std::fma(p, r, c::kC4);
  p = std::fma(p, r, c::kC3);
  p = std::fma(p, r, c::kC2);
  p = std::fma(p, r, -1.0f);
  p = std::fma(p, r, 1.0f);
  // The low bits of shifted, moved to the exponent, are 2^n (n in -116..116): d = 1 + e^-x, rounded once.
  const float d = std::fma(p, detail::bits_float(detail::float_bits(shifted) << 23), 1.0f);
  return g * (1.0f / d);
}

// rho = 1 for the shared expert: the multiplication changes nothing. limit: positive, infinity for no clamp.
DSV4_HD inline float swiglu(float g, float u, float rho, float limit) {
  g = g > limit ? limit : g;
  g = g < -swiglu_constants::kMaxGate ? -swiglu_constants::kMaxGate : g;
  u = u > limit ? limit : u;
  u = u < -limit ? -limit : u;
  return rho * (silu(g) * u);
}

}  // namespace dsv4
