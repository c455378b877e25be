// Writes one cache row or index key from the registers of a warp.
#pragma once

#include "codec/fp8_block.h"
#include "ops/quantize/encode_device.cuh"
#include "ops/quantize/kv_pages.h"

namespace dsv4 {

// Where a row lives; computed early, because the divisions take a while.
struct RowAddress {
  uint8_t* data;
  uint8_t* scales;
};
__device__ __forceinline__ RowAddress row_address(const DevicePages& pages, PageLayout layout, int32_t row) {
  const int32_t page = row / pages.rows_per_page, at = row - page * pages.rows_per_page;
  uint8_t* base = pages.base + page * pages.page_stride;
  return {base + int64_t{at} * layout.data_bytes,
          base + int64_t{pages.rows_per_page} * layout.data_bytes + int64_t{at} * layout.scale_bytes};
}

// Lane l holds channels 16 l .. 16 l + 15, already rounded to bf16; lanes 28..31 hold the rotated part.
__device__ __forceinline__ void write_kv_row(const RowAddress& address, KvFormat format, const float (&x)[16]) {
  const uint32_t lane = threadIdx.x % 32;
  uint8_t *data = address.data, *scales = address.scales;
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) pairs[i] = ptx::cvt_bf16x2(x[2 * i], x[2 * i + 1]);
  const uint4 low = {pairs[0], pairs[1], pairs[2], pairs[3]}, high = {pairs[4], pairs[5], pairs[6], pairs[7]};
  constexpr uint32_t kNopeLanes = (kKvHeadDim - kKvRopeDim) / 16;
  if (format == KvFormat::kBf16) {
    reinterpret_cast<uint4*>(data)[2 * lane] = low;
    reinterpret_cast<uint4*>(data)[2 * lane + 1] = high;
    return;
  }
  bool has_nan;
  float amax = amax_of(x, &has_nan);
  if (format == KvFormat::kFp8) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    if (lane < kNopeLanes) {
      const uint32_t scale = fp8_block_scale(amax);
      const float factor = rcp_ue8m0(scale);
      const uint2 a = encode_e4m3x8(x, factor), b = encode_e4m3x8(x + 8, factor);
      reinterpret_cast<uint4*>(data)[lane] = {a.x, a.y, b.x, b.y};
      if (lane % 4 == 0) scales[lane / 4] = static_cast<uint8_t>(scale);
    }
    if (lane == 31) scales[7] = 0;
  } else {
    if (lane < kNopeLanes) {
      const Nvfp4GroupScale scale = nvfp4_group_scale(amax, 1.0f, nvfp4_rcp6({1.0f}));
      reinterpret_cast<uint2*>(data)[lane] = encode_e2m1x16(x, scale.multiplier, amax, has_nan);
      scales[lane] = static_cast<uint8_t>(scale.sf);
    } else {
      scales[lane] = 0;
    }
  }
  if (lane >= kNopeLanes) {
    auto* rope = reinterpret_cast<uint4*>(data + (format == KvFormat::kFp8 ? 448 : 224)) + 2 * (lane - kNopeLanes);
    rope[0] = low;
    rope[1] = high;
  }
}

// Lane l holds channels 4 l .. 4 l + 3 of a key; for kFp8 and kFp4 already rotated by the Hadamard matrix.
__device__ __forceinline__ void write_index_key(const RowAddress& address, IndexFormat format, const float (&x)[4]) {
  const uint32_t lane = threadIdx.x % 32;
  uint8_t *data = address.data, *scales = address.scales;
  if (format == IndexFormat::kBf16) {
    reinterpret_cast<uint2*>(data)[lane] = {ptx::cvt_bf16x2(x[0], x[1]), ptx::cvt_bf16x2(x[2], x[3])};
    return;
  }
  float amax = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
  const int lanes = format == IndexFormat::kFp8 ? 32 : kFp4IndexBlock / 4;
  for (int step = 1; step < lanes; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
  if (format == IndexFormat::kFp8) {
    const uint32_t scale = fp8_block_scale(amax);
    const float factor = rcp_ue8m0(scale);
    reinterpret_cast<uint32_t*>(data)[lane] =
        ptx::cvt_e4m3x2(x[0] * factor, x[1] * factor) | ptx::cvt_e4m3x2(x[2] * factor, x[3] * factor) << 16;
    if (lane == 0) *reinterpret_cast<float*>(scales) = decode_ue8m0(static_cast<uint8_t>(scale));
  } else {
    const uint8_t scale = fp4_block_scale(amax);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= static_cast<uint32_t>(encode_fp4_block_element(x[i], scale)) << (4 * i);
    reinterpret_cast<uint16_t*>(data)[lane] = static_cast<uint16_t>(codes);
    if (lane % 8 == 0) scales[lane / 8] = scale;
  }
}

}  // namespace dsv4
