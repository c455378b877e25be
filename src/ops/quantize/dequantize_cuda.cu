// dequantize_rows (dense, or gathered by index) and dequantize_fp8_blocks: a thread decodes vectors of 8 elements, so that every
// store of bf16 is 16 bytes and a warp writes 512 consecutive ones.
#include "gpu/fast_div.h"
#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "ops/quantize/decode_device.cuh"
#include "ops/quantize/quantize_gpu.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;  // vectors in flight: 36 bytes of codes and scales a thread

struct Shape {
  uint32_t num_vecs, vecs_per_row;
  gpu::FastDiv by_vecs_per_row;
};

template <bool kF32, int kVecs>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArgs args, const Shape shape) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t first = blockIdx.x * (kVecs * kThreads) + threadIdx.x;
  uint32_t codes[kVecs], sfs[kVecs];
  float global = args.global_mode == GlobalMode::kGiven ? args.global[0] : 1.0f;
  float globals[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t v = first + i * kThreads;
    codes[i] = 0, sfs[i] = 0, globals[i] = global;
    if (v >= shape.num_vecs) continue;
    const uint32_t out_row = shape.by_vecs_per_row.quotient(v), vec = v - out_row * shape.vecs_per_row;
    int64_t row = out_row;
    if (args.rows) {
      row = args.rows[out_row];
      if (row < 0 || row >= args.num_rows) {
        if (row != -1 && vec == 0 && args.bad_rows) atomicAdd(args.bad_rows, 1);
        continue;
      }
    }
    codes[i] = reinterpret_cast<const uint32_t*>(args.codes)[row * shape.vecs_per_row + vec];
    const int64_t sf_at = args.sf_layout == SfLayout::kLinear ? row * (shape.vecs_per_row / 2) + vec / 2
                                                              : sf_offset_128x4(row, vec / 2, shape.vecs_per_row / 2);
    sfs[i] = args.sf[sf_at] & 0x7fu;
    if (args.global_mode == GlobalMode::kPerRow) globals[i] = args.global[row];
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t v = first + i * kThreads;
    if (v >= shape.num_vecs) return;
    uint32_t pairs[4];
    decode_nvfp4x8(codes[i], sfs[i], pairs);
    if constexpr (kF32) {
      float values[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = ptx::low_bf16(pairs[j]) * globals[i];
        values[2 * j + 1] = ptx::high_bf16(pairs[j]) * globals[i];
      }
      auto* y = reinterpret_cast<float4*>(args.y) + 2 * int64_t{v};
      y[0] = {values[0], values[1], values[2], values[3]};
      y[1] = {values[4], values[5], values[6], values[7]};
    } else {
      if (args.global_mode != GlobalMode::kOne)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          pairs[j] = ptx::cvt_bf16x2(ptx::low_bf16(pairs[j]) * globals[i], ptx::high_bf16(pairs[j]) * globals[i]);
      ptx::store_stream_16(reinterpret_cast<uint4*>(args.y) + v, {pairs[0], pairs[1], pairs[2], pairs[3]});
    }
  }
}

__global__ void __launch_bounds__(kThreads) fp8_block_kernel(const DequantizeFp8BlockArgs args, const Shape shape, uint32_t blocks_per_row) {
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

Shape make_shape(const char* op, int64_t num_rows, int64_t cols) {
  DSV4_GPU_REQUIRE(op, cols > 0 && cols % kNvfp4GroupSize == 0, "cols = %lld", static_cast<long long>(cols));
  DSV4_GPU_REQUIRE(op, num_rows >= 0 && num_rows * (cols / 8) < (int64_t{1} << 31) - 4096, "rows = %lld, cols = %lld: 2^31 vectors at most",
                   static_cast<long long>(num_rows), static_cast<long long>(cols));
  Shape shape{};
  shape.vecs_per_row = static_cast<uint32_t>(cols / 8);
  shape.num_vecs = static_cast<uint32_t>(num_rows) * shape.vecs_per_row;
  shape.by_vecs_per_row = gpu::FastDiv(shape.vecs_per_row);
  return shape;
}

template <bool kF32>
void launch_dequantize(const DequantizeArgs& args, const Shape& shape, const GpuContext& context) {
  const bool small = shape.num_vecs < static_cast<uint32_t>(context.num_sms) * kThreads * kUnroll;
  const uint32_t per_cta = kThreads * (small ? 1 : kUnroll);
  const gpu::LaunchConfig config{
      .grid = (shape.num_vecs + per_cta - 1) / per_cta, .block = kThreads, .stream = context.stream, .dependent = context.dependent};
  gpu::launch(small ? dequantize_kernel<kF32, 1> : dequantize_kernel<kF32, kUnroll>, config, args, shape);
}

}  // namespace

void dequantize_rows(const DequantizeArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "dequantize_rows";
  const Shape shape = make_shape(kOp, args.num_out, args.cols);
  DSV4_GPU_REQUIRE(kOp, args.rows || args.num_out == args.num_rows, "num_out = %lld, num_rows = %lld", static_cast<long long>(args.num_out),
                   static_cast<long long>(args.num_rows));
  DSV4_GPU_REQUIRE(kOp, args.global_mode != GlobalMode::kComputeRow, "kComputeRow is for encoding");
  if (args.num_out == 0) return;
  if (args.y_is_f32)
    launch_dequantize<true>(args, shape, context);
  else
    launch_dequantize<false>(args, shape, context);
}

void dequantize_fp8_blocks(const DequantizeFp8BlockArgs& args, const GpuContext& context) {
  const Shape shape = make_shape("dequantize_fp8_blocks", args.num_rows, args.cols);
  if (args.num_rows == 0) return;
  const gpu::LaunchConfig config{
      .grid = (shape.num_vecs + 4 * kThreads - 1) / (4 * kThreads), .block = kThreads, .stream = context.stream, .dependent = context.dependent};
  gpu::launch(fp8_block_kernel, config, args, shape, static_cast<uint32_t>((args.cols + 127) / 128));
}

}  // namespace dsv4
