// swiglu_quantize: clamped SwiGLU of bf16 gate and up rows, quantised from registers.
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_kernels.cuh"
#include "ops/quantize/swiglu_device.cuh"

namespace dsv4 {
namespace {

struct SwigluSource {
  const bf16* gate;
  const bf16* up;
  const float* rho;
  uint32_t stride;  // vectors
  float limit;

  struct Raw {
    uint4 gate, up;
  };
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const int64_t at = int64_t{row} * stride + vec;
    return {ptx::load_stream_16(reinterpret_cast<const uint4*>(gate) + at), ptx::load_stream_16(reinterpret_cast<const uint4*>(up) + at)};
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t row, uint32_t, float (&out)[8]) const {
    const float weight = rho ? rho[row] : 1.0f;
    const uint32_t g[4] = {raw.gate.x, raw.gate.y, raw.gate.z, raw.gate.w}, u[4] = {raw.up.x, raw.up.y, raw.up.z, raw.up.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[2 * j] = swiglu_device(ptx::low_bf16(g[j]), ptx::low_bf16(u[j]), weight, limit);
      out[2 * j + 1] = swiglu_device(ptx::high_bf16(g[j]), ptx::high_bf16(u[j]), weight, limit);
    }
  }
};

}  // namespace

void swiglu_quantize(const SwigluQuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("swiglu_quantize", args.stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.gate) % 16 == 0 && reinterpret_cast<uintptr_t>(args.up) % 16 == 0,
                   "stride = %lld, gate = %p, up = %p", static_cast<long long>(args.stride), static_cast<const void*>(args.gate), static_cast<const void*>(args.up));
  DSV4_GPU_REQUIRE("swiglu_quantize", args.limit > 0 && args.limit <= 80, "limit = %g", static_cast<double>(args.limit));
  const SwigluSource source{args.gate, args.up, args.rho, static_cast<uint32_t>(args.stride / 8), args.limit};
  launch_quantize<2>("swiglu_quantize", source, args.out, RowNorm{}, args.num_rows, args.cols, context);
}

}  // namespace dsv4
