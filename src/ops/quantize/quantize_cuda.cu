// quantize_rows: dense bf16 or binary32 rows, with or without an RMS norm.
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {
namespace {

struct Bf16Source {
  const bf16* x;
  uint32_t stride;  // vectors

  using Raw = uint4;
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    return ptx::load_stream_16(reinterpret_cast<const uint4*>(x) + int64_t{row} * stride + vec);
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t, uint32_t, float (&out)[8]) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[2 * j] = ptx::low_bf16(words[j]);
      out[2 * j + 1] = ptx::high_bf16(words[j]);
    }
  }
};

struct F32Source {
  const float* x;
  uint32_t stride;  // vectors of 8

  struct Raw {
    uint4 low, high;
  };
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint4* at = reinterpret_cast<const uint4*>(x) + 2 * (int64_t{row} * stride + vec);
    return {*at, at[1]};  // through L1: the two halves of a sector are fetched by different instructions
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t, uint32_t, float (&out)[8]) const {
    const uint32_t words[8] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w, raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __uint_as_float(words[j]);
  }
};

}  // namespace

void quantize_rows(const QuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("quantize_rows", args.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0, "x_stride = %lld, x = %p",
                   static_cast<long long>(args.x_stride), args.x);
  const RowNorm norm{args.norm_weight, args.norm_eps};
  const auto stride = static_cast<uint32_t>(args.x_stride / 8);
  if (args.x_is_f32)
    launch_quantize<2>("quantize_rows", F32Source{static_cast<const float*>(args.x), stride}, args.out, norm, args.num_rows, args.cols, context);
  else
    launch_quantize<4>("quantize_rows", Bf16Source{static_cast<const bf16*>(args.x), stride}, args.out, norm, args.num_rows, args.cols, context);
}

}  // namespace dsv4
