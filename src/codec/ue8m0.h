// ue8m0: a power of two in one byte, value 2^(byte - 127); 0xff is NaN, byte 0 is 2^-127 (a binary32 subnormal).
//
// Scales of MXFP4 and of DeepSeek's FP8 blocks. Bytes are copied, never cast from a number.
#pragma once

#include <cstdint>

#include "codec/bf16.h"

namespace dsv4 {

DSV4_HD constexpr float decode_ue8m0(uint8_t byte) {
  if (byte == 0xff) return detail::bits_float(0x7fc00000u);
  if (byte == 0) return detail::bits_float(0x00400000u);  // 2^-127
  return detail::bits_float(static_cast<uint32_t>(byte) << 23);
}

// Smallest power of two >= x, as an exponent: ceil(log2(x)) read off the bits. x must be a positive normal number.
DSV4_HD constexpr int ceil_log2(float x) {
  const uint32_t u = detail::float_bits(x);
  return static_cast<int>((u >> 23) & 0xffu) - 127 + ((u & 0x7fffffu) != 0 ? 1 : 0);
}

}  // namespace dsv4
