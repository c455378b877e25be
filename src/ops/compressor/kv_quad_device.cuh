// Writes one cache row from the registers of the threads that computed it: four neighbouring channels each, the bytes of write_kv_row.
#pragma once

#include "ops/quantize/kv_row_device.cuh"

namespace dsv4 {

// x * multiplier -> 4 nibbles, element 0 lowest. multiplier >= 0 or NaN.
__device__ __forceinline__ uint32_t encode_e2m1x4(const float (&x)[4], float multiplier) {
  float y[4];
  bool small = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[i] = __fmul_rn(x[i], multiplier);
    small = small && fabsf(y[i]) < 7.0f;  // not for a NaN
  }
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    codes |= (small ? (e2m1_magnitude(fabsf(y[i])) & 7u) | __float_as_uint(x[i]) >> 31 << 3
                    : static_cast<uint32_t>(encode_e2m1(y[i])))
             << (4 * i);
  return codes;
}

// Neighbouring lanes hold neighbouring quads: channel .. channel + 3, already rounded to bf16; lanes in aligned groups of sixteen. Whole
// warps come here; valid: this lane's quad is to be written.
__device__ __forceinline__ void write_kv_quad(const RowAddress& address, KvFormat format, int channel, bool valid,
                                              const float (&x)[4]) {
  constexpr int kNope = kKvHeadDim - kKvRopeDim;
  const uint2 pairs = {ptx::cvt_bf16x2(x[0], x[1]), ptx::cvt_bf16x2(x[2], x[3])};
  if (format == KvFormat::kBf16) {
    if (valid) *reinterpret_cast<uint2*>(address.data + 2 * channel) = pairs;
    return;
  }
  float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
  amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
  const bool rotated = channel >= kNope;
  if (format == KvFormat::kFp8) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 4));
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 8));
    if (!valid) return;
    const uint32_t scale = fp8_block_scale(amax);
    const float factor = rcp_ue8m0(scale);
    if (rotated)
      *reinterpret_cast<uint2*>(address.data + kNope + 2 * (channel - kNope)) = pairs;
    else
      *reinterpret_cast<uint32_t*>(address.data + channel) =
          ptx::cvt_e4m3x2(x[0] * factor, x[1] * factor) | ptx::cvt_e4m3x2(x[2] * factor, x[3] * factor) << 16;
    if (channel % kFp8KvBlock == 0) address.scales[channel / kFp8KvBlock] = rotated ? 0 : static_cast<uint8_t>(scale);
  } else {
    if (!valid) return;
    const Nvfp4GroupScale scale = nvfp4_group_scale(amax, 1.0f, nvfp4_rcp6({1.0f}));
    if (rotated)
      *reinterpret_cast<uint2*>(address.data + kNope / 2 + 2 * (channel - kNope)) = pairs;
    else
      *reinterpret_cast<uint16_t*>(address.data + channel / 2) =
          static_cast<uint16_t>(encode_e2m1x4(x, scale.multiplier));
    if (channel % 16 == 0) address.scales[channel / 16] = rotated ? 0 : static_cast<uint8_t>(scale.sf);
  }
}

}  // namespace dsv4
