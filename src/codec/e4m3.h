// e4m3 ("fn" variant) and ue4m3: 8-bit floats with 4 exponent bits (bias 7) and 3 mantissa bits.
//
//   value of 0 eeee mmm: eeee == 0 -> mmm / 512; else 2^(eeee-7) * (1 + mmm/8); largest 448 (0x7e); 0x7f/0xff NaN; no inf.
//   ue4m3 is the same byte with sign 0; NVFP4 block scales are ue4m3.
//
// Encoding: to nearest, ties to even, once, from binary32; magnitudes above 448 (infinity too) saturate to 448; NaN -> 0x7f.
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace dsv4 {

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3MinSubnormal = 0x1p-9f;

DSV4_HD constexpr uint8_t encode_e4m3(float x) {
  const uint32_t u = detail::float_bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t sign = (u >> 24) & 0x80u;
  if (magnitude > 0x7f800000u) return 0x7f;                                 // NaN
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);  // >= 448
  if (magnitude < 0x3c800000u) {                                            // < 2^-6: subnormal, steps of 2^-9
    // Adding 2^14 leaves exactly the steps of 2^-9 in the mantissa (ulp of [2^14, 2^15) is 2^-9): one RNE rounding.
    const float shifted = detail::bits_float(magnitude) + 16384.0f;
    return static_cast<uint8_t>(sign | (detail::float_bits(shifted) - 0x46800000u));
  }
  // Normal: round the 23-bit mantissa to 3 bits in place (carries into the exponent as it should), then rebias 127 -> 7.
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));  // below 448: never more than 0x7e
}

DSV4_HD constexpr float decode_e4m3(uint8_t code) {
  const uint32_t exponent = (code >> 3) & 0xfu;
  const uint32_t mantissa = code & 0x7u;
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  if ((code & 0x7fu) == 0x7fu) return detail::bits_float(sign | 0x7fc00000u);
  const float magnitude = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9f
                                        : detail::bits_float(((exponent + 120u) << 23) | (mantissa << 20));
  return detail::bits_float(detail::float_bits(magnitude) | sign);
}

// ue4m3: x must not be negative; -0 gives 0.
DSV4_HD constexpr uint8_t encode_ue4m3(float x) { return encode_e4m3(x) & 0x7fu; }
DSV4_HD constexpr float decode_ue4m3(uint8_t code) { return decode_e4m3(code & 0x7fu); }

}  // namespace dsv4
