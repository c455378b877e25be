// bfloat16: the upper half of a binary32. 8 exponent bits, 7 mantissa bits; same range as binary32.
//
// Rounding: to nearest, ties to even, once. NaN stays NaN (quiet bit set, sign and upper payload kept). Subnormals are kept.
#pragma once

#include <bit>
#include <cstdint>

#include "codec/host_device.h"

namespace dsv4 {

struct bf16 {
  uint16_t bits;
  friend DSV4_HD constexpr bool operator==(bf16 a, bf16 b) { return a.bits == b.bits; }
};
static_assert(sizeof(bf16) == 2);

namespace detail {
// std::bit_cast is host-only under some device compilers; __builtin_bit_cast is constexpr on both sides.
DSV4_HD constexpr uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
DSV4_HD constexpr float bits_float(uint32_t u) { return __builtin_bit_cast(float, u); }
}  // namespace detail

DSV4_HD constexpr float decode_bf16(bf16 x) { return detail::bits_float(static_cast<uint32_t>(x.bits) << 16); }

DSV4_HD constexpr bf16 encode_bf16(float x) {
  const uint32_t u = detail::float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x0040u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// x rounded to the nearest bf16, as binary32.
DSV4_HD constexpr float round_bf16(float x) { return decode_bf16(encode_bf16(x)); }

}  // namespace dsv4
