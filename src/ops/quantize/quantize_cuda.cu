// quantize_rows: dense bf16 or binary32 rows, with or without an RMS norm.
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_launch.cuh"

namespace dsv4 {
namespace {

struct Bf16Source {
  const bf16* x;
  uint32_t stride;  // 16-byte pieces

  static constexpr SourceTraits kTraits{
      .ring_stream = true, .ring_tiled = true, .ring_rows = true, .ring_norm = true, .teams = true};
  struct Raw {
    uint4 low, high;
  };
  __host__ bool contiguous(uint32_t vecs_per_row) const { return stride == 2 * vecs_per_row; }
  __device__ __forceinline__ uint32_t order(uint32_t thread) const { return thread; }
  __device__ __forceinline__ const uint4* at(uint32_t row, uint32_t vec) const {
    return reinterpret_cast<const uint4*>(x) + int64_t{row} * stride + 2 * int64_t{vec};
  }
  __device__ __forceinline__ void prefetch(uint32_t row, uint32_t vec) const { ptx::prefetch_l2(at(row, vec)); }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    return {__ldg(at(row, vec)),
            __ldg(at(row, vec) + 1)};  // through L1: the halves of a sector are fetched by two instructions
  }
  __device__ __forceinline__ float row_factor(uint32_t) const { return 1.0f; }
  __device__ __forceinline__ Vector16 vector(const Raw& raw, uint32_t, uint32_t, float) const {
    return vector_of_pairs(raw.low, raw.high);
  }

  __host__ bool stageable() const { return true; }
  __host__ uint32_t extra_bytes(uint32_t) const { return 0; }
  __device__ __forceinline__ int32_t ahead(uint32_t) const { return 0; }
  __device__ __forceinline__ void queue(uint8_t* stage, uint64_t* barrier, uint32_t row, uint32_t first_vec,
                                        uint32_t count, int32_t) const {
    ptx::mbarrier_arrive_expect_tx(barrier, count * kTraits.vec_bytes);
    ptx::bulk_load(stage, at(row, first_vec), count * kTraits.vec_bytes, barrier);
  }
  __device__ __forceinline__ void prefetch_piece(uint32_t row, uint32_t first_vec, uint32_t count) const {
    ptx::bulk_prefetch_l2(at(row, first_vec), count * kTraits.vec_bytes);
  }
  __device__ __forceinline__ Vector16 staged(const uint8_t* stage, uint32_t, uint32_t vec, float) const {
    return load_bf16_vector(stage + vec * kTraits.vec_bytes);
  }
  __device__ __forceinline__ Raw staged_raw(const uint8_t* stage, uint32_t, uint32_t vec) const {
    const auto* from = reinterpret_cast<const uint4*>(stage + vec * kTraits.vec_bytes);
    return {from[0], from[1]};
  }
  __device__ __forceinline__ static void pairs(const Raw& raw, uint32_t (&pairs)[8]) {
    const uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                               raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) pairs[j] = words[j];
  }
};

struct F32Source {
  const float* x;
  uint32_t stride;  // 16-byte pieces

  static constexpr SourceTraits kTraits{.stream_ctas = 3, .vec_bytes = 64};
  struct Raw {
    uint4 piece[4];
  };
  __host__ bool contiguous(uint32_t vecs_per_row) const { return stride == 4 * vecs_per_row; }
  __device__ __forceinline__ uint32_t order(uint32_t thread) const { return thread; }
  __device__ __forceinline__ const uint4* at(uint32_t row, uint32_t vec) const {
    return reinterpret_cast<const uint4*>(x) + int64_t{row} * stride + 4 * int64_t{vec};
  }
  __device__ __forceinline__ void prefetch(uint32_t row, uint32_t vec) const { ptx::prefetch_l2(at(row, vec)); }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint4* from = at(row, vec);
    return {{__ldg(from), __ldg(from + 1), __ldg(from + 2), __ldg(from + 3)}};
  }
  __device__ __forceinline__ float row_factor(uint32_t) const { return 1.0f; }
  __device__ __forceinline__ Vector16 vector(const Raw& raw, uint32_t, uint32_t, float) const {
    Vector16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t words[4] = {raw.piece[i].x, raw.piece[i].y, raw.piece[i].z, raw.piece[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) v.x[4 * i + j] = __uint_as_float(words[j]);
    }
    finish_vector(v);
    return v;
  }
};

}  // namespace

void quantize_rows(const QuantizeArgs& args, const GpuContext& context) {
  DSV4_GPU_REQUIRE("quantize_rows", args.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0,
                   "x_stride = %lld, x = %p", static_cast<long long>(args.x_stride), args.x);
  const RowNorm norm{args.norm_weight, args.norm_eps};
  const auto stride = static_cast<uint32_t>(args.x_stride / (args.x_is_f32 ? 4 : 8));
  if (args.x_is_f32)
    launch_quantize("quantize_rows", F32Source{static_cast<const float*>(args.x), stride}, args.out, norm,
                    args.num_rows, args.cols, context);
  else
    launch_quantize("quantize_rows", Bf16Source{static_cast<const bf16*>(args.x), stride}, args.out, norm,
                    args.num_rows, args.cols, context);
}

}  // namespace dsv4
