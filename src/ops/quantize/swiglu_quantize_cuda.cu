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
  uint32_t stride;  // 16-byte pieces
  float limit;

  using Shared = NoShared;
  static constexpr uint32_t kMaxVecsPerThread = 4, kMinCtas = 3;
  __device__ __forceinline__ void prepare(Shared&) {}
  struct Raw {
    uint4 gate[2], up[2];
  };
  __device__ __forceinline__ uint32_t order(uint32_t thread) const { return thread; }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const int64_t at = int64_t{row} * stride + 2 * vec;
    const auto* g = reinterpret_cast<const uint4*>(gate) + at;
    const auto* u = reinterpret_cast<const uint4*>(up) + at;
    return {{__ldg(g), __ldg(g + 1)}, {__ldg(u), __ldg(u + 1)}};
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t row, uint32_t, float (&out)[16]) const {
    const float weight = rho ? rho[row] : 1.0f;
    float g[16], u[16];
    widen_bf16x16(raw.gate[0], raw.gate[1], g);
    widen_bf16x16(raw.up[0], raw.up[1], u);
#pragma unroll
    for (int j = 0; j < 16; ++j) out[j] = swiglu_device(g[j], u[j], weight, limit);
  }
};

}  // namespace

void swiglu_quantize(const SwigluQuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("swiglu_quantize", args.stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.gate) % 16 == 0 && reinterpret_cast<uintptr_t>(args.up) % 16 == 0,
                   "stride = %lld, gate = %p, up = %p", static_cast<long long>(args.stride), static_cast<const void*>(args.gate), static_cast<const void*>(args.up));
  DSV4_GPU_REQUIRE("swiglu_quantize", args.limit > 0 && args.limit <= 80, "limit = %g", static_cast<double>(args.limit));
  const SwigluSource source{args.gate, args.up, args.rho, static_cast<uint32_t>(args.stride / 8), args.limit};
  launch_quantize("swiglu_quantize", source, args.out, RowNorm{}, args.num_rows, args.cols, context);
}

}  // namespace dsv4
