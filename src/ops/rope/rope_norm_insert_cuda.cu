// rope_norm_insert and gather_kv_rows: 16 channels of a head (or cache row) a lane, several heads (rows) in flight per warp.
#include "gpu/fast_div.h"
#include "gpu/launch.h"
#include "gpu/ptx/sync.cuh"
#include "ops/quantize/decode_device.cuh"
#include "ops/quantize/kv_row_device.cuh"
#include "ops/quantize/store_device.cuh"
#include "ops/rope/rope_gpu.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kFirstRopeLane = (kKvHeadDim - kKvRopeDim) / 16;

__device__ __forceinline__ void widen(uint4 low, uint4 high, float (&x)[16]) {
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    x[2 * j] = ptx::low_bf16(words[j]);
    x[2 * j + 1] = ptx::high_bf16(words[j]);
  }
}

// rsqrt(mean(x^2) + eps) over the warp's 512 channels.
__device__ __forceinline__ float rms_factor(const float (&x)[16], float eps) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum = __fma_rn(static_cast<double>(x[i]), static_cast<double>(x[i]), sum);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return __frcp_rn(__fsqrt_rn(static_cast<float>(sum) / static_cast<float>(kKvHeadDim) + eps));
}

__device__ __forceinline__ void rotate(float (&x)[16], const float* cos_sin) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < kFirstRopeLane) return;
  const float* cosines = cos_sin + 8 * (lane - kFirstRopeLane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float cos = cosines[i], sin = cosines[kKvRopeDim / 2 + i], even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos - odd * sin;
    x[2 * i + 1] = even * sin + odd * cos;
  }
}

__device__ __forceinline__ void round_to_bf16(float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t pair = ptx::cvt_bf16x2(x[2 * i], x[2 * i + 1]);
    x[2 * i] = ptx::low_bf16(pair);
    x[2 * i + 1] = ptx::high_bf16(pair);
  }
}

// Work item i: token i / (num_heads + 1); the last of each token's items is its kv row. A warp takes kItems consecutive ones and loads
// them all before it works on the first: two where there is work for all, one where a call is over before that pays.
template <uint32_t kItems>
__global__ void __launch_bounds__(kThreads)
    rope_norm_insert_kernel(const RopeNormInsertArgs args, const gpu::FastDiv by_items_per_token, uint32_t num_items) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t first = (blockIdx.x * kThreads + threadIdx.x) / 32 * kItems, lane = threadIdx.x % 32;
  const uint32_t num_heads = static_cast<uint32_t>(args.num_heads);
  uint4 low[kItems], high[kItems];
  const float* cos_sin[kItems];
#pragma unroll
  for (uint32_t k = 0; k < kItems; ++k) {
    if (first + k >= num_items) break;
    const uint32_t token = by_items_per_token.quotient(first + k),
                   head = first + k - token * by_items_per_token.divisor;
    const bf16* row =
        head < num_heads ? args.q + (int64_t{token} * num_heads + head) * kKvHeadDim : args.kv + token * args.kv_stride;
    low[k] = reinterpret_cast<const uint4*>(row)[2 * lane];
    high[k] = reinterpret_cast<const uint4*>(row)[2 * lane + 1];
    cos_sin[k] = args.cos_sin + int64_t{args.rope_rows[token]} * kKvRopeDim;
  }
#pragma unroll
  for (uint32_t k = 0; k < kItems; ++k) {
    if (first + k >= num_items) return;
    const uint32_t token = by_items_per_token.quotient(first + k),
                   head = first + k - token * by_items_per_token.divisor;
    float x[16];
    widen(low[k], high[k], x);
    const float factor = rms_factor(x, args.eps);
    if (head < num_heads) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= factor;
      rotate(x, cos_sin[k]);
      uint32_t pairs[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) pairs[i] = ptx::cvt_bf16x2(x[2 * i], x[2 * i + 1]);
      store_pieces<2>(args.q_out, (int64_t{token} * num_heads + head) * (kKvHeadDim / 8) + 2 * lane, true,
                      {pairs[0], pairs[1], pairs[2], pairs[3]}, {pairs[4], pairs[5], pairs[6], pairs[7]});
    } else {
      const auto* weight_at = reinterpret_cast<const uint4*>(args.kv_weight) + 2 * lane;
      float weight[16];
      widen(weight_at[0], weight_at[1], weight);
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = weight[i] * (x[i] * factor);
      round_to_bf16(x);
      rotate(x, cos_sin[k]);
      round_to_bf16(x);
      const int32_t row = args.slots[token];
      if (row >= 0 && row < args.pages.num_rows)
        write_kv_row(row_address(args.pages, kv_page_layout(args.format), row), args.format, x);
    }
  }
}

// A warp takes kGathered rows and loads them all before it decodes the first: most of a row's time is waiting for its index, then for it.
constexpr uint32_t kGathered = 4;

template <KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, 3)
    gather_kv_rows_kernel(const GatherKvRowsArgs args, const gpu::FastDiv by_rows_per_page) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32 * kGathered;
  const uint32_t lane = threadIdx.x % 32;
  if (first >= args.num_out) return;
  constexpr PageLayout kLayout = kv_page_layout(kFormat);
  constexpr uint32_t kRopeOffset = kFormat == KvFormat::kFp8 ? 448 : 224;
  const int32_t mine = lane < kGathered && first + lane < args.num_out ? args.rows[first + lane] : -1;
  uint4 low[kGathered] = {}, high[kGathered] = {};
  uint32_t scales[kGathered] = {};
#pragma unroll
  for (uint32_t k = 0; k < kGathered; ++k) {
    const int32_t row = __shfl_sync(0xffffffffu, mine, k);
    if (row < 0 || row >= args.pages.num_rows) continue;
    const uint32_t page = by_rows_per_page.quotient(row), at = row - page * by_rows_per_page.divisor;
    const uint8_t* base = args.pages.base + page * args.pages.page_stride;
    const uint8_t* data = base + at * kLayout.data_bytes;
    if (kFormat == KvFormat::kBf16 || lane >= kFirstRopeLane) {
      const auto* from = reinterpret_cast<const uint4*>(data + (kFormat == KvFormat::kBf16 ? 0 : kRopeOffset)) +
                         2 * (kFormat == KvFormat::kBf16 ? lane : lane - kFirstRopeLane);
      low[k] = __ldg(from), high[k] = __ldg(from + 1);
    } else if constexpr (kFormat == KvFormat::kFp8) {
      low[k] = __ldg(reinterpret_cast<const uint4*>(data) + lane);
    } else {
      const uint2 codes = __ldg(reinterpret_cast<const uint2*>(data) + lane);
      low[k].x = codes.x, low[k].y = codes.y;
    }
    if (kFormat != KvFormat::kBf16 && lane < kFirstRopeLane)
      scales[k] = __ldg(base + args.pages.rows_per_page * kLayout.data_bytes + at * kLayout.scale_bytes +
                        (kFormat == KvFormat::kFp8 ? lane / 4 : lane));
  }
#pragma unroll
  for (uint32_t k = 0; k < kGathered; ++k) {
    if (first + k >= args.num_out) return;
    uint32_t pairs[8] = {low[k].x, low[k].y, low[k].z, low[k].w, high[k].x, high[k].y, high[k].z, high[k].w};
    if (lane < kFirstRopeLane) {
      if constexpr (kFormat == KvFormat::kFp8) {
        const uint32_t words[4] = {low[k].x, low[k].y, low[k].z, low[k].w};
        const float scale = decode_ue8m0(static_cast<uint8_t>(scales[k]));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint2 four = decode_e4m3x4_bf16(words[i], scale);
          pairs[2 * i] = four.x;
          pairs[2 * i + 1] = four.y;
        }
      }
      if constexpr (kFormat == KvFormat::kNvfp4) decode_nvfp4x16({low[k].x, low[k].y}, scales[k] & 0x7fu, pairs);
    }
    store_pieces<2>(args.y, (first + k) * (kKvHeadDim / 8) + 2 * lane, true, {pairs[0], pairs[1], pairs[2], pairs[3]},
                    {pairs[4], pairs[5], pairs[6], pairs[7]});
  }
}

void require_pages(const char* op, const DevicePages& pages, KvFormat format) {
  DSV4_GPU_REQUIRE(op, format != KvFormat::kF32, "binary32 rows exist on the CPU only");
  const PageLayout layout = kv_page_layout(format);
  DSV4_GPU_REQUIRE(op,
                   pages.rows_per_page > 0 && pages.page_stride % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(pages.base) % 16 == 0 &&
                       pages.page_stride >= int64_t{pages.rows_per_page} * (layout.data_bytes + layout.scale_bytes),
                   "page_stride = %lld, rows_per_page = %d, base = %p", static_cast<long long>(pages.page_stride),
                   pages.rows_per_page, static_cast<void*>(pages.base));
}

}  // namespace

void rope_norm_insert(const RopeNormInsertArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "rope_norm_insert";
  if (args.kv) require_pages(kOp, args.pages, args.format);
  DSV4_GPU_REQUIRE(kOp, args.num_heads >= 0 && args.kv_stride % 8 == 0, "num_heads = %d, kv_stride = %lld",
                   args.num_heads, static_cast<long long>(args.kv_stride));
  const int64_t per_token = args.num_heads + (args.kv ? 1 : 0), num_items = args.num_tokens * per_token;
  DSV4_GPU_REQUIRE(kOp, num_items < (int64_t{1} << 31) - 64, "num_tokens = %lld, num_heads = %d",
                   static_cast<long long>(args.num_tokens), args.num_heads);
  if (num_items == 0) return;
  const bool is_long = num_items >= int64_t{128} * context.num_sms;
  const int64_t num_warps = is_long ? (num_items + 1) / 2 : num_items;
  gpu::launch(is_long ? rope_norm_insert_kernel<2> : rope_norm_insert_kernel<1>,
              {.grid = static_cast<uint32_t>((num_warps * 32 + kThreads - 1) / kThreads),
               .block = kThreads,
               .stream = context.stream,
               .dependent = context.dependent},
              args, gpu::FastDiv(static_cast<uint32_t>(per_token)), static_cast<uint32_t>(num_items));
}

void gather_kv_rows(const GatherKvRowsArgs& args, const GpuContext& context) {
  require_pages("gather_kv_rows", args.pages, args.format);
  if (args.num_out == 0) return;
  const auto kernel = args.format == KvFormat::kBf16  ? gather_kv_rows_kernel<KvFormat::kBf16>
                      : args.format == KvFormat::kFp8 ? gather_kv_rows_kernel<KvFormat::kFp8>
                                                      : gather_kv_rows_kernel<KvFormat::kNvfp4>;
  const int64_t num_warps = (args.num_out + kGathered - 1) / kGathered;
  gpu::launch(kernel,
              {.grid = static_cast<uint32_t>((num_warps * 32 + kThreads - 1) / kThreads),
               .block = kThreads,
               .stream = context.stream,
               .dependent = context.dependent},
              args, gpu::FastDiv(static_cast<uint32_t>(args.pages.rows_per_page)));
}

}  // namespace dsv4
