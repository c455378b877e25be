// rope_norm_insert: everything between the q and kv projections and the attention, in one kernel.
//
//   q:  per head, x * rsqrt(mean(x^2) + eps) without weight, RoPE on the last 64 channels, rounded to bf16 once (spec 3.1)
//   kv: RMS norm with weight -> bf16, RoPE -> bf16, then the cache row in its format (spec 3.2; codec as ops/attention/kv_row.cpp)
// Sums of squares in binary64, rounded once: the bytes of the CPU ops. 512 channels per head.
#pragma once

#include "codec/bf16.h"
#include "gpu/context.h"
#include "ops/quantize/kv_pages.h"

namespace dsv4 {

struct RopeNormInsertArgs {
  const bf16* q;             // [num_tokens, num_heads, 512]
  bf16* q_out;               // [num_tokens, num_heads, 512]; may be q
  const bf16* kv;            // [num_tokens, 512], rows kv_stride apart; nullptr: queries only
  int64_t kv_stride;         // elements, multiple of 8
  const bf16* kv_weight;     // [512]
  const float* cos_sin;      // [num_positions, 64]: 32 cosines, then 32 sines
  const int32_t* rope_rows;  // [num_tokens] row of cos_sin
  const int32_t* slots;      // [num_tokens] cache row; outside [0, pages.num_rows): not stored
  DevicePages pages;
  KvFormat format;     // kBf16, kFp8, kNvfp4
  int64_t num_tokens;  // 0 is legal
  int num_heads;       // 0 is legal: kv only
  float eps;
};

void rope_norm_insert(const RopeNormInsertArgs& args, const GpuContext& context);

// Cache rows -> bf16, gathered: the inverse of the insert's format. rows outside [0, pages.num_rows) give zeros.
struct GatherKvRowsArgs {
  DevicePages pages;
  KvFormat format;
  const int32_t* rows;  // [num_out]
  bf16* y;              // [num_out, 512]
  int64_t num_out;
};

void gather_kv_rows(const GatherKvRowsArgs& args, const GpuContext& context);

}  // namespace dsv4
