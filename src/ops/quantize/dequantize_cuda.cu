// dequantize_rows (dense, or gathered by index) and dequantize_fp8_blocks. A lane decodes a 16-group of NVFP4 (for binary32 half
// of one): two pieces of 16 bytes out, exchanged between neighbours so that stores fill whole sectors.
#include <type_traits>

#include "gpu/fast_div.h"
#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "ops/quantize/decode_device.cuh"
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/store_device.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kGatherVecs = 2;  // of a thread, in flight at once: an index, then the row it names

struct Shape {
  uint32_t num_vecs, vecs_per_row;
  gpu::FastDiv by_vecs_per_row;
};

template <bool kF32, int kVecs>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArgs args, const Shape shape) {
  using Codes = std::conditional_t<kF32, uint32_t, uint2>;  // of one lane: 8 or 16 elements
  constexpr int kLanesPerGroup = kF32 ? 2 : 1;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t first = blockIdx.x * (kVecs * kThreads) + threadIdx.x;
  const float global = args.global_mode == GlobalMode::kGiven ? args.global[0] : 1.0f;
  const bool needs_row = args.rows || args.sf_layout != SfLayout::kLinear || args.global_mode == GlobalMode::kPerRow;
  // One step for all groups before the next: a group's loads do not wait for another group's.
  int32_t rows[kVecs];
  uint32_t vecs[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t v = first + i * kThreads;
    rows[i] = 0, vecs[i] = v;
    if (needs_row) {
      rows[i] = static_cast<int32_t>(shape.by_vecs_per_row.quotient(v));
      vecs[i] = v - static_cast<uint32_t>(rows[i]) * shape.vecs_per_row;
    }
  }
  bool readable[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    readable[i] = first + i * kThreads < shape.num_vecs;
    if (args.rows && readable[i]) rows[i] = args.rows[rows[i]];
  }
  Codes codes[kVecs];
  uint32_t sfs[kVecs];
  float globals[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    codes[i] = {}, sfs[i] = 0, globals[i] = global;
    if (args.rows && readable[i] && (rows[i] < 0 || rows[i] >= args.num_rows)) {
      if (rows[i] != -1 && vecs[i] == 0 && args.bad_rows) atomicAdd(args.bad_rows, 1);
      readable[i] = false;
    }
    if (!readable[i]) continue;
    const int64_t at = int64_t{rows[i]} * shape.vecs_per_row + vecs[i];
    codes[i] = __ldg(reinterpret_cast<const Codes*>(args.codes) + at);
    const int64_t sf_at = args.sf_layout == SfLayout::kLinear
                              ? at / kLanesPerGroup
                              : sf_offset_128x4(rows[i], vecs[i] / kLanesPerGroup, shape.vecs_per_row / kLanesPerGroup);
    sfs[i] = __ldg(args.sf + sf_at);
    if (args.global_mode == GlobalMode::kPerRow) globals[i] = args.global[rows[i]];
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t v = first + i * kThreads;
    if (v - threadIdx.x % 32 >= shape.num_vecs) return;  // whole warps leave together
    uint32_t out[8];
    if constexpr (kF32) {
      uint32_t pairs[4];
      decode_nvfp4x8(codes[i], decode_ue4m3_bf16x2(sfs[i] & 0x7fu), pairs);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[2 * j] = __float_as_uint(ptx::low_bf16(pairs[j]) * globals[i]);
        out[2 * j + 1] = __float_as_uint(ptx::high_bf16(pairs[j]) * globals[i]);
      }
    } else {
      decode_nvfp4x16(codes[i], sfs[i] & 0x7fu, out);
      if (args.global_mode != GlobalMode::kOne)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          out[j] = ptx::cvt_bf16x2(ptx::low_bf16(out[j]) * globals[i], ptx::high_bf16(out[j]) * globals[i]);
    }
    store_pieces<2>(args.y, 2 * int64_t{v}, v < shape.num_vecs, {out[0], out[1], out[2], out[3]},
                    {out[4], out[5], out[6], out[7]});
  }
}

__global__ void __launch_bounds__(kThreads)
    fp8_block_kernel(const DequantizeFp8BlockArgs args, const Shape shape, uint32_t blocks_per_row) {
  constexpr int kVecs = 4;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t first = blockIdx.x * (kVecs * kThreads) + threadIdx.x;
  uint2 codes[kVecs] = {};
  float scales[kVecs] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t v = first + i * kThreads;
    if (v >= shape.num_vecs) continue;
    const uint32_t row = shape.by_vecs_per_row.quotient(v), vec = v - row * shape.vecs_per_row;
    codes[i] = reinterpret_cast<const uint2*>(args.codes)[v];
    scales[i] = args.block_scales[row / 128 * blocks_per_row + vec / 16];
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t v = first + i * kThreads;
    if (v >= shape.num_vecs) return;
    const uint2 low = decode_e4m3x4_bf16(codes[i].x, scales[i]), high = decode_e4m3x4_bf16(codes[i].y, scales[i]);
    ptx::store_stream_16(reinterpret_cast<uint4*>(args.y) + v, {low.x, low.y, high.x, high.y});
  }
}

Shape make_shape(const char* op, int64_t num_rows, int64_t cols, int vec_elems) {
  DSV4_GPU_REQUIRE(op, cols > 0 && cols % kNvfp4GroupSize == 0, "cols = %lld", static_cast<long long>(cols));
  DSV4_GPU_REQUIRE(op, num_rows >= 0 && num_rows * (cols / vec_elems) < (int64_t{1} << 31) - 4096,
                   "rows = %lld, cols = %lld: 2^31 vectors at most", static_cast<long long>(num_rows),
                   static_cast<long long>(cols));
  Shape shape{};
  shape.vecs_per_row = static_cast<uint32_t>(cols / vec_elems);
  shape.num_vecs = static_cast<uint32_t>(num_rows) * shape.vecs_per_row;
  shape.by_vecs_per_row = gpu::FastDiv(shape.vecs_per_row);
  return shape;
}

template <bool kF32>
void launch_dequantize(const DequantizeArgs& args, const Shape& shape, const GpuContext& context) {
  const bool several = args.rows && shape.num_vecs > static_cast<uint32_t>(context.num_sms) * kThreads * kGatherVecs;
  const uint32_t per_cta = kThreads * (several ? kGatherVecs : 1);
  const gpu::LaunchConfig config{.grid = (shape.num_vecs + per_cta - 1) / per_cta,
                                 .block = kThreads,
                                 .stream = context.stream,
                                 .dependent = context.dependent};
  gpu::launch(several ? dequantize_kernel<kF32, kGatherVecs> : dequantize_kernel<kF32, 1>, config, args, shape);
}

}  // namespace

void dequantize_rows(const DequantizeArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "dequantize_rows";
  DSV4_GPU_REQUIRE(kOp, args.cols % kNvfp4GroupSize == 0, "cols = %lld", static_cast<long long>(args.cols));
  const Shape shape = make_shape(kOp, args.num_out, args.cols, args.y_is_f32 ? 8 : 16);
  DSV4_GPU_REQUIRE(kOp, args.rows || args.num_out == args.num_rows, "num_out = %lld, num_rows = %lld",
                   static_cast<long long>(args.num_out), static_cast<long long>(args.num_rows));
  DSV4_GPU_REQUIRE(kOp, args.global_mode != GlobalMode::kComputeRow, "kComputeRow is for encoding");
  if (args.num_out == 0) return;
  if (args.y_is_f32)
    launch_dequantize<true>(args, shape, context);
  else
    launch_dequantize<false>(args, shape, context);
}

void dequantize_fp8_blocks(const DequantizeFp8BlockArgs& args, const GpuContext& context) {
  const Shape shape = make_shape("dequantize_fp8_blocks", args.num_rows, args.cols, 8);
  if (args.num_rows == 0) return;
  const gpu::LaunchConfig config{.grid = (shape.num_vecs + 4 * kThreads - 1) / (4 * kThreads),
                                 .block = kThreads,
                                 .stream = context.stream,
                                 .dependent = context.dependent};
  gpu::launch(fp8_block_kernel, config, args, shape, static_cast<uint32_t>((args.cols + 127) / 128));
}

}  // namespace dsv4
