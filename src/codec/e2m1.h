// e2m1: the 4-bit float of NVFP4 and MXFP4. Bit 3 sign, bits 2..1 exponent (bias 1), bit 0 mantissa; no inf, no NaN.
//
//   code       0   1   2   3    4   5   6   7      (8..15: the negatives, 8 is -0)
//   magnitude  0  .5   1  1.5   2   3   4   6
//
// Encoding rounds once, straight from binary32, to nearest with ties to the even code:
//   |x| <= .25 -> 0, < .75 -> .5, <= 1.25 -> 1, < 1.75 -> 1.5, <= 2.5 -> 2, < 3.5 -> 3, <= 5 -> 4, else 6 (saturates).
// NaN -> 0x7 (+6), as cvt.rn.satfinite.e2m1x2.f32. The sign of -0 and of small negatives is kept.
// The classic bug rounds to half steps first: then 2.70 -> 2.5 -> 2 instead of 3, and 5.2 -> 5 -> 4 instead of 6.
//
// Packing (e2m1x2): element 2j in the LOW nibble, 2j+1 in the HIGH nibble of byte j.
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace dsv4 {

DSV4_HD constexpr uint8_t encode_e2m1(float x) {
  const uint32_t u = detail::float_bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7;  // NaN
  const float a = detail::bits_float(magnitude);
  uint8_t code = 0;
  code += a > 0.25f;
  code += a >= 0.75f;
  code += a > 1.25f;
  code += a >= 1.75f;
  code += a > 2.5f;
  code += a >= 3.5f;
  code += a > 5.0f;
  return static_cast<uint8_t>(code | ((u >> 28) & 0x8u));
}

// Twice the value of a code, an integer in -12..12: products of two doubled codes are exact in int16.
DSV4_HD constexpr int decode_e2m1_doubled(uint8_t code) {
  const int m = code & 0x7;
  const int magnitude = m < 4 ? m : (m < 6 ? 2 * m - 4 : 4 * m - 16);  // 0 1 2 3 4 6 8 12
  return (code & 0x8) ? -magnitude : magnitude;
}

DSV4_HD constexpr float decode_e2m1(uint8_t code) {
  const float magnitude = 0.5f * static_cast<float>(decode_e2m1_doubled(code & 0x7));
  return detail::bits_float(detail::float_bits(magnitude) | (static_cast<uint32_t>(code & 0x8) << 28));
}

DSV4_HD constexpr uint8_t pack_e2m1x2(uint8_t even, uint8_t odd) {
  return static_cast<uint8_t>((even & 0xf) | (odd << 4));
}
DSV4_HD constexpr uint8_t e2m1x2_even(uint8_t byte) { return byte & 0xf; }
DSV4_HD constexpr uint8_t e2m1x2_odd(uint8_t byte) { return byte >> 4; }

}  // namespace dsv4
