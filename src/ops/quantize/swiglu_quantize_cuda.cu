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

// silu of every bf16 with magnitude in [2^-16, 2^7): both signs, 23 KiB. Filled by the compiler from the definition.
constexpr uint32_t kFirstBits = (127 - 16) << 7, kTableHalf = (16 + 7) << 7;
struct SiluTable {
  float value[2 * kTableHalf];
};
constexpr SiluTable make_silu_table() {
  SiluTable table{};
  for (uint32_t i = 0; i < kTableHalf; ++i) {
    const float g = decode_bf16({static_cast<uint16_t>(kFirstBits + i)});
    table.value[i] = silu(g);
    table.value[kTableHalf + i] = silu(-g);
  }
  return table;
}
__device__ constexpr SiluTable kSiluTable = make_silu_table();

// The same numbers with silu looked up in shared memory: long streams are bound by arithmetic otherwise. Gates outside the table
// (zero, tiny, large negative) are computed. limit must be a bf16 number.
struct SwigluTableSource : SwigluSource {
  struct Shared {
    alignas(16) SiluTable table;
  };
  static constexpr uint32_t kMaxVecsPerThread = 64;
  const float* table;

  __device__ __forceinline__ void prepare(Shared& shared) {
    for (uint32_t i = threadIdx.x; i < 2 * kTableHalf / 4; i += kStreamThreads)
      reinterpret_cast<float4*>(shared.table.value)[i] = reinterpret_cast<const float4*>(kSiluTable.value)[i];
    __syncthreads();
    table = shared.table.value;
  }
  __device__ __forceinline__ float looked_up(float g) const {
    const uint32_t bits = __float_as_uint(g), at = (bits >> 16 & 0x7fffu) - kFirstBits;
    return at < kTableHalf ? table[at + (bits >> 31) * kTableHalf] : silu(g);
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t row, uint32_t, float (&out)[16]) const {
    const float weight = rho ? rho[row] : 1.0f;
    float g[16], u[16];
    widen_bf16x16(raw.gate[0], raw.gate[1], g);
    widen_bf16x16(raw.up[0], raw.up[1], u);
#pragma unroll
    for (int j = 0; j < 16; ++j)
      out[j] = weight * (looked_up(ptx::min_nan(g[j], limit)) * ptx::max_nan(ptx::min_nan(u[j], limit), -limit));
  }
};

}  // namespace

void swiglu_quantize(const SwigluQuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("swiglu_quantize", args.stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.gate) % 16 == 0 && reinterpret_cast<uintptr_t>(args.up) % 16 == 0,
                   "stride = %lld, gate = %p, up = %p", static_cast<long long>(args.stride), static_cast<const void*>(args.gate), static_cast<const void*>(args.up));
  DSV4_GPU_REQUIRE("swiglu_quantize", args.limit > 0 && args.limit <= 80, "limit = %g", static_cast<double>(args.limit));
  const SwigluSource source{args.gate, args.up, args.rho, static_cast<uint32_t>(args.stride / 8), args.limit};
  // The table pays from about sixteen vectors a thread on.
  const bool is_long = args.num_rows * args.cols >= int64_t{8} << 20 && args.out.global_mode != GlobalMode::kComputeRow && round_bf16(args.limit) == args.limit;
  if (is_long)
    launch_quantize("swiglu_quantize", SwigluTableSource{source, nullptr}, args.out, RowNorm{}, args.num_rows, args.cols, context);
  else
    launch_quantize("swiglu_quantize", source, args.out, RowNorm{}, args.num_rows, args.cols, context);
}

}  // namespace dsv4
