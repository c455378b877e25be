// swiglu_quantize: clamped SwiGLU of bf16 gate and up rows, quantised from registers.
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_launch.cuh"
#include "ops/quantize/swiglu_device.cuh"

namespace dsv4 {
namespace {

// kBf16Limit: limit is a bf16 number, so that pairs are clamped before they are widened.
template <bool kWeighted, bool kBf16Limit>
struct SwigluSource {
  const bf16* gate;
  const bf16* up;
  const float* rho;  // kWeighted; may be nullptr
  uint32_t stride;   // 16-byte pieces
  float limit;

  static constexpr SourceTraits kTraits{.has_rows = kWeighted,
                                        .stream_ctas = 3,
                                        .ring_rows = kBf16Limit,
                                        .teams = true,
                                        .settles = true,
                                        .vec_bytes = 64,
                                        .ring_rows_from = 48 << 10};
  struct Raw {
    uint4 gate[2], up[2];
  };
  __host__ bool contiguous(uint32_t vecs_per_row) const { return stride == 2 * vecs_per_row; }
  __device__ __forceinline__ uint32_t order(uint32_t thread) const { return thread; }
  __device__ __forceinline__ int64_t at(uint32_t row, uint32_t vec) const {
    return int64_t{row} * stride + 2 * int64_t{vec};
  }
  __device__ __forceinline__ const uint4* gates(uint32_t row, uint32_t vec) const {
    return reinterpret_cast<const uint4*>(gate) + at(row, vec);
  }
  __device__ __forceinline__ const uint4* ups(uint32_t row, uint32_t vec) const {
    return reinterpret_cast<const uint4*>(up) + at(row, vec);
  }
  __device__ __forceinline__ void prefetch(uint32_t row, uint32_t vec) const {
    ptx::prefetch_l2(gates(row, vec));
    ptx::prefetch_l2(ups(row, vec));
  }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint4 *g = gates(row, vec), *u = ups(row, vec);
    return {{__ldg(g), __ldg(g + 1)}, {__ldg(u), __ldg(u + 1)}};
  }
  __device__ __forceinline__ float row_factor(uint32_t row) const { return kWeighted && rho ? rho[row] : 1.0f; }
  __device__ __forceinline__ Vector16 vector(const Raw& raw, uint32_t, uint32_t, float row_factor) const {
    const uint32_t g[8] = {raw.gate[0].x, raw.gate[0].y, raw.gate[0].z, raw.gate[0].w,
                           raw.gate[1].x, raw.gate[1].y, raw.gate[1].z, raw.gate[1].w};
    const uint32_t u[8] = {raw.up[0].x, raw.up[0].y, raw.up[0].z, raw.up[0].w,
                           raw.up[1].x, raw.up[1].y, raw.up[1].z, raw.up[1].w};
    Vector16 v;
    if constexpr (kBf16Limit) {
      const uint32_t top = ptx::cvt_bf16x2(limit, limit),
                     bottom = ptx::cvt_bf16x2(-swiglu_constants::kMaxGate, -swiglu_constants::kMaxGate);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t gates = ptx::max_nan_bf16x2(ptx::min_nan_bf16x2(g[j], top), bottom),
                       ups = ptx::clamp_bf16x2(u[j], top);
        v.x[2 * j] = silu_device(ptx::low_bf16(gates)) * ptx::low_bf16(ups);
        v.x[2 * j + 1] = silu_device(ptx::high_bf16(gates)) * ptx::high_bf16(ups);
        if constexpr (kWeighted) v.x[2 * j] *= row_factor, v.x[2 * j + 1] *= row_factor;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v.x[2 * j] = swiglu_device(ptx::low_bf16(g[j]), ptx::low_bf16(u[j]), row_factor, limit);
        v.x[2 * j + 1] = swiglu_device(ptx::high_bf16(g[j]), ptx::high_bf16(u[j]), row_factor, limit);
      }
    }
    finish_vector(v);
    return v;
  }

  // Staged: the gates of a piece, then its ups.
  __host__ bool stageable() const { return true; }
  __host__ uint32_t extra_bytes(uint32_t piece_vecs) const {
    return piece_vecs * 4;
  }  // largest magnitudes, between the passes
  __device__ __forceinline__ int32_t ahead(uint32_t) const { return 0; }
  __device__ __forceinline__ void queue(uint8_t* stage, uint64_t* barrier, uint32_t row, uint32_t first_vec,
                                        uint32_t count, int32_t) const {
    ptx::mbarrier_arrive_expect_tx(barrier, count * kTraits.vec_bytes);
    ptx::bulk_load(stage, gates(row, first_vec), count * 32, barrier);
    ptx::bulk_load(stage + count * 32, ups(row, first_vec), count * 32, barrier);
  }
  __device__ __forceinline__ void prefetch_piece(uint32_t row, uint32_t first_vec, uint32_t count) const {
    ptx::bulk_prefetch_l2(gates(row, first_vec), count * 32);
    ptx::bulk_prefetch_l2(ups(row, first_vec), count * 32);
  }
  __device__ __forceinline__ Raw staged_raw(const uint8_t* stage, uint32_t count, uint32_t vec) const {
    const auto* g = reinterpret_cast<const uint4*>(stage + vec * 32);
    const auto* u = reinterpret_cast<const uint4*>(stage + (count + vec) * 32);
    return {{g[0], g[1]}, {u[0], u[1]}};
  }
  __device__ __forceinline__ Vector16 staged(const uint8_t* stage, uint32_t count, uint32_t vec,
                                             float row_factor) const {
    return vector(staged_raw(stage, count, vec), 0, 0, row_factor);
  }
  // binary32 results take the place of their gates and ups.
  __device__ __forceinline__ void settle(uint8_t* stage, uint32_t count, uint32_t vec, const Vector16& v) const {
    auto* low = reinterpret_cast<float4*>(stage + vec * 32);
    auto* high = reinterpret_cast<float4*>(stage + (count + vec) * 32);
    low[0] = {v.x[0], v.x[1], v.x[2], v.x[3]};
    low[1] = {v.x[4], v.x[5], v.x[6], v.x[7]};
    high[0] = {v.x[8], v.x[9], v.x[10], v.x[11]};
    high[1] = {v.x[12], v.x[13], v.x[14], v.x[15]};
    reinterpret_cast<float*>(stage + count * kTraits.vec_bytes)[vec] = v.amax;
  }
  __device__ __forceinline__ Vector16 settled(const uint8_t* stage, uint32_t count, uint32_t vec) const {
    const auto* low = reinterpret_cast<const float4*>(stage + vec * 32);
    const auto* high = reinterpret_cast<const float4*>(stage + (count + vec) * 32);
    const float4 quads[4] = {low[0], low[1], high[0], high[1]};
    Vector16 v;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      v.x[4 * j] = quads[j].x, v.x[4 * j + 1] = quads[j].y, v.x[4 * j + 2] = quads[j].z, v.x[4 * j + 3] = quads[j].w;
    finish_vector(v);
    v.amax = reinterpret_cast<const float*>(stage + count * kTraits.vec_bytes)[vec];
    return v;
  }
};

template <bool kWeighted, bool kBf16Limit>
void launch_swiglu(const SwigluQuantizeArgs& args, const GpuContext& context) {
  launch_quantize("swiglu_quantize",
                  SwigluSource<kWeighted, kBf16Limit>{args.gate, args.up, args.rho,
                                                      static_cast<uint32_t>(args.stride / 8), args.limit},
                  args.out, RowNorm{}, args.num_rows, args.cols, context);
}

}  // namespace

void swiglu_quantize(const SwigluQuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("swiglu_quantize",
                   args.stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.gate) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(args.up) % 16 == 0,
                   "stride = %lld, gate = %p, up = %p", static_cast<long long>(args.stride),
                   static_cast<const void*>(args.gate), static_cast<const void*>(args.up));
  DSV4_GPU_REQUIRE("swiglu_quantize", args.limit > 0 && args.limit <= 80, "limit = %g",
                   static_cast<double>(args.limit));
  if (round_bf16(args.limit) != args.limit) return launch_swiglu<true, false>(args, context);
  args.rho ? launch_swiglu<true, true>(args, context) : launch_swiglu<false, true>(args, context);
}

}  // namespace dsv4
