// Stands in for src/gpu/ptx/convert.cuh; approximations are as good as binary32 gets.
#pragma once

#include "codec/bf16.h"
#include "codec/e4m3.h"
#include "emulate.h"

namespace dsv4::ptx {

inline constexpr bool kHasCvtE2m1 = false;
inline uint32_t cvt_e2m1x2(float, float) { return 0; }
inline uint32_t cvt_e4m3x2(float even, float odd) {
  return encode_e4m3(even) | static_cast<uint32_t>(encode_e4m3(odd)) << 8;
}
// Codes of e4m3 are normal numbers of f16, or zero.
inline uint32_t cvt_f16x2_e4m3x2(uint32_t codes) {
  const auto f16 = [](uint8_t code) -> uint32_t {
    const float value = decode_e4m3(code);
    if (std::isnan(value)) return 0x7fff;
    const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    return (bits >> 16 & 0x8000) | (magnitude == 0 ? 0 : (magnitude >> 13) - ((127 - 15) << 10));
  };
  return f16(static_cast<uint8_t>(codes)) | f16(static_cast<uint8_t>(codes >> 8)) << 16;
}
inline float2 cvt_f32_f16x2(uint32_t pair) {  // of normal numbers, zero and NaN
  const auto widened = [](uint32_t half) {
    const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude > 0x7c00) return __uint_as_float(0x7fffffffu);
    return __uint_as_float(sign | (magnitude == 0 ? 0 : (magnitude << 13) + ((127 - 15) << 23)));
  };
  return {widened(pair & 0xffff), widened(pair >> 16)};
}
inline uint32_t bf16_bits(float x) {
  const bf16 value = encode_bf16(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}
inline uint32_t cvt_bf16x2(float even, float odd) { return bf16_bits(even) | bf16_bits(odd) << 16; }
inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float max_nan(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::fmax(a, b); }
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  return cvt_bf16x2(max_nan(low_bf16(a), low_bf16(b)), max_nan(high_bf16(a), high_bf16(b)));
}
inline uint32_t max_magnitude_bf16x2(uint32_t a, uint32_t b) {
  return max_nan_bf16x2(a & 0x7fff7fffu, b & 0x7fff7fffu) | ((a ^ b) & 0x80008000u);
}
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rcp_approx_ftz(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

}  // namespace dsv4::ptx
