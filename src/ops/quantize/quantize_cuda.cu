// quantize_rows: dense bf16 or binary32 rows, with or without an RMS norm.
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {
namespace {

struct Bf16Source {
  const bf16* x;
  uint32_t stride;  // 16-byte pieces

  using Shared = NoShared;
  static constexpr uint32_t kMaxVecsPerThread = 4, kMinCtas = 4;
  __device__ __forceinline__ void prepare(Shared&) {}
  struct Raw {
    uint4 low, high;
  };
  __device__ __forceinline__ uint32_t order(uint32_t thread) const { return thread; }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint4* at = reinterpret_cast<const uint4*>(x) + int64_t{row} * stride + 2 * vec;
    return {__ldg(at), __ldg(at + 1)};  // through L1: the halves of a sector are fetched by two instructions
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t, uint32_t, float (&out)[16]) const { widen_bf16x16(raw.low, raw.high, out); }
};

struct F32Source {
  const float* x;
  uint32_t stride;  // 16-byte pieces

  using Shared = NoShared;
  static constexpr uint32_t kMaxVecsPerThread = 4, kMinCtas = 3;
  __device__ __forceinline__ void prepare(Shared&) {}
  struct Raw {
    uint4 piece[4];
  };
  __device__ __forceinline__ uint32_t order(uint32_t thread) const { return thread; }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint4* at = reinterpret_cast<const uint4*>(x) + int64_t{row} * stride + 4 * vec;
    return {{__ldg(at), __ldg(at + 1), __ldg(at + 2), __ldg(at + 3)}};
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t, uint32_t, float (&out)[16]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t words[4] = {raw.piece[i].x, raw.piece[i].y, raw.piece[i].z, raw.piece[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) out[4 * i + j] = __uint_as_float(words[j]);
    }
  }
};

}  // namespace

void quantize_rows(const QuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("quantize_rows", args.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0, "x_stride = %lld, x = %p",
                   static_cast<long long>(args.x_stride), args.x);
  const RowNorm norm{args.norm_weight, args.norm_eps};
  const auto stride = static_cast<uint32_t>(args.x_stride / (args.x_is_f32 ? 4 : 8));
  if (args.x_is_f32)
    launch_quantize("quantize_rows", F32Source{static_cast<const float*>(args.x), stride}, args.out, norm, args.num_rows, args.cols, context);
  else
    launch_quantize("quantize_rows", Bf16Source{static_cast<const bf16*>(args.x), stride}, args.out, norm, args.num_rows, args.cols, context);
}

}  // namespace dsv4
