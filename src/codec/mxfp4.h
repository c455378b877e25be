// MXFP4: e2m1 elements with one ue8m0 scale per 32 along K, and its lossless re-expression as NVFP4.
//
//   k_j = byte - 127 per 32-group; k_max over the tensor (w1 and w3 together; all-zero groups do not count);
//   global = 2^(k_max - 8); both 16-halves of group j get sf = 2^(k_j - k_max + 8); nibbles are copied.
// Exact while k_max - k_j <= 17 (2^-9 is the smallest ue4m3 power of two). The reverse is never done.
#pragma once

#include <cstdint>

#include "codec/e4m3.h"
#include "codec/nvfp4.h"
#include "codec/ue8m0.h"

namespace dsv4 {

constexpr int kMxfp4GroupSize = 32;
constexpr int kMxfp4MaxExponentSpread = 17;

// e2m1 code * 2^(byte-127), exact in binary32 except below its subnormal range.
DSV4_HD constexpr float decode_mxfp4(uint8_t code, uint8_t ue8m0) { return decode_e2m1(code) * decode_ue8m0(ue8m0); }

// True if the 16 bytes of a 32-group hold only +-0.
DSV4_HD constexpr bool mxfp4_group_is_zero(const uint8_t* codes) {
  for (int j = 0; j < kMxfp4GroupSize / 2; ++j)
    if (codes[j] & 0x77) return false;
  return true;
}

// ue4m3 code of 2^exponent, exponent in -9..8.
DSV4_HD constexpr uint8_t ue4m3_power_of_two(int exponent) {
  return static_cast<uint8_t>(exponent >= -6 ? (exponent + 7) << 3 : 1 << (exponent + 9));
}

// Global scale for a tensor (or a w1/w3 pair) whose largest non-zero group has byte max_byte. k_max - 8 lies in
// [-135, 119]: below -126 the result is a binary32 subnormal, still exact.
DSV4_HD constexpr GlobalScale mxfp4_to_nvfp4_global(uint8_t max_byte) {
  const int exponent = static_cast<int>(max_byte) - 127 - 8;
  return {exponent >= -126 ? detail::bits_float(static_cast<uint32_t>(exponent + 127) << 23)
                           : detail::bits_float(1u << (exponent + 149))};
}

}  // namespace dsv4
