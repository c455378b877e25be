// rope_norm_insert: a warp per head (or kv row), 16 channels a lane; gather_kv_rows: a warp per row.
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

// Warp w: token w / (num_heads + 1); the last of each token's warps takes the kv row.
__global__ void __launch_bounds__(kThreads) rope_norm_insert_kernel(const RopeNormInsertArgs args, const gpu::FastDiv by_warps_per_token, uint32_t num_warps) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t warp = (blockIdx.x * kThreads + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (warp >= num_warps) return;
  const uint32_t token = by_warps_per_token.quotient(warp), head = warp - token * by_warps_per_token.divisor;
  const float* cos_sin = args.cos_sin + int64_t{args.rope_rows[token]} * kKvRopeDim;
  float x[16];
  if (head < static_cast<uint32_t>(args.num_heads)) {
    const int64_t piece = (int64_t{token} * args.num_heads + head) * (kKvHeadDim / 8) + 2 * lane;
    const auto* at = reinterpret_cast<const uint4*>(args.q) + piece;
    widen(at[0], at[1], x);
    const float factor = rms_factor(x, args.eps);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= factor;
    rotate(x, cos_sin);
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i] = ptx::cvt_bf16x2(x[2 * i], x[2 * i + 1]);
    store_pieces<2>(args.q_out, piece, true, {pairs[0], pairs[1], pairs[2], pairs[3]}, {pairs[4], pairs[5], pairs[6], pairs[7]});
  } else {
    const auto* at = reinterpret_cast<const uint4*>(args.kv + token * args.kv_stride) + 2 * lane;
    const auto* weight_at = reinterpret_cast<const uint4*>(args.kv_weight) + 2 * lane;
    widen(at[0], at[1], x);
    const float factor = rms_factor(x, args.eps);
    float weight[16];
    widen(weight_at[0], weight_at[1], weight);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = weight[i] * (x[i] * factor);
    round_to_bf16(x);
    rotate(x, cos_sin);
    round_to_bf16(x);
    const int32_t row = args.slots[token];
    if (row >= 0 && row < args.pages.num_rows) write_kv_row(row_address(args.pages, kv_page_layout(args.format), row), args.format, x);
  }
}

__global__ void __launch_bounds__(kThreads) gather_kv_rows_kernel(const GatherKvRowsArgs args) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t out_row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const uint32_t lane = threadIdx.x % 32;
  if (out_row >= args.num_out) return;
  const int32_t row = args.rows[out_row];
  uint32_t pairs[8] = {};
  if (row >= 0 && row < args.pages.num_rows) {
    const PageLayout layout = kv_page_layout(args.format);
    const uint8_t* data = args.pages.data(row, layout);
    const uint8_t* scales = args.pages.scales(row, layout);
    if (args.format == KvFormat::kBf16 || lane >= kFirstRopeLane) {
      const int64_t first = args.format == KvFormat::kBf16 ? 0 : args.format == KvFormat::kFp8 ? 448 : 224;
      const auto* at = reinterpret_cast<const uint4*>(data + first) + 2 * (args.format == KvFormat::kBf16 ? lane : lane - kFirstRopeLane);
      const uint4 low = at[0], high = at[1];
      pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
      pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
    } else if (args.format == KvFormat::kFp8) {
      const uint4 codes = reinterpret_cast<const uint4*>(data)[lane];
      const float scale = decode_ue8m0(scales[lane / 4]);
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2 four = decode_e4m3x4_bf16(words[i], scale);
        pairs[2 * i] = four.x;
        pairs[2 * i + 1] = four.y;
      }
    } else {
      decode_nvfp4x16(reinterpret_cast<const uint2*>(data)[lane], scales[lane] & 0x7fu, pairs);
    }
  }
  store_pieces<2>(args.y, out_row * (kKvHeadDim / 8) + 2 * lane, true, {pairs[0], pairs[1], pairs[2], pairs[3]}, {pairs[4], pairs[5], pairs[6], pairs[7]});
}

void require_pages(const char* op, const DevicePages& pages, KvFormat format) {
  DSV4_GPU_REQUIRE(op, format != KvFormat::kF32, "binary32 rows exist on the CPU only");
  const PageLayout layout = kv_page_layout(format);
  DSV4_GPU_REQUIRE(op, pages.rows_per_page > 0 && pages.page_stride % 16 == 0 && reinterpret_cast<uintptr_t>(pages.base) % 16 == 0 &&
                           pages.page_stride >= int64_t{pages.rows_per_page} * (layout.data_bytes + layout.scale_bytes),
                   "page_stride = %lld, rows_per_page = %d, base = %p", static_cast<long long>(pages.page_stride), pages.rows_per_page,
                   static_cast<void*>(pages.base));
}

}  // namespace

void rope_norm_insert(const RopeNormInsertArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "rope_norm_insert";
  if (args.kv) require_pages(kOp, args.pages, args.format);
  DSV4_GPU_REQUIRE(kOp, args.num_heads >= 0 && args.kv_stride % 8 == 0, "num_heads = %d, kv_stride = %lld", args.num_heads, static_cast<long long>(args.kv_stride));
  const int64_t per_token = args.num_heads + (args.kv ? 1 : 0), num_warps = args.num_tokens * per_token;
  DSV4_GPU_REQUIRE(kOp, num_warps < (int64_t{1} << 31), "num_tokens = %lld, num_heads = %d", static_cast<long long>(args.num_tokens), args.num_heads);
  if (num_warps == 0) return;
  gpu::launch(rope_norm_insert_kernel,
              {.grid = static_cast<uint32_t>((num_warps * 32 + kThreads - 1) / kThreads), .block = kThreads, .stream = context.stream, .dependent = context.dependent},
              args, gpu::FastDiv(static_cast<uint32_t>(per_token)), static_cast<uint32_t>(num_warps));
}

void gather_kv_rows(const GatherKvRowsArgs& args, const GpuContext& context) {
  require_pages("gather_kv_rows", args.pages, args.format);
  if (args.num_out == 0) return;
  gpu::launch(gather_kv_rows_kernel,
              {.grid = static_cast<uint32_t>((args.num_out * 32 + kThreads - 1) / kThreads), .block = kThreads, .stream = context.stream, .dependent = context.dependent}, args);
}

}  // namespace dsv4
