// inverse_rope_quantize: attention output, rotated back by the query's position, quantised in the grouped layout.
#include <algorithm>
#include <bit>

#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_launch.cuh"

namespace dsv4 {
namespace {

struct InverseRopeSource {
  const bf16* x;
  const float* cos_sin;
  const int32_t* positions;
  uint32_t num_tokens, token_vecs, group_vecs;
  uint32_t head_vecs, head_shift, first_rope_vec;  // head_vecs = head_dim / 16 = 2^head_shift
  uint32_t num_pairs;
  bool groups_by_rotation;
  gpu::FastDiv by_tokens, by_rope_vecs;

  static constexpr SourceTraits kTraits{.has_rows = true, .ring_stream = true, .ring_rows = true, .prepares = true};
  struct Raw {
    uint4 low, high;
  };
  // Eight heads of 32 vectors a CTA: the aligned eights that hold the rotated channels go to two warps, so that six have no rotation.
  __device__ __forceinline__ uint32_t order(uint32_t thread) const {
    if (!groups_by_rotation) return thread;
    return thread < 192 ? thread / 24 * 32 + thread % 24 : (thread - 192) / 8 * 32 + 24 + thread % 8;
  }
  __device__ __forceinline__ bool rotated(uint32_t vec) const { return (vec & (head_vecs - 1)) >= first_rope_vec; }
  __device__ __forceinline__ uint32_t token_of(uint32_t row) const {
    return row - by_tokens.quotient(row) * num_tokens;
  }
  __device__ __forceinline__ const uint4* at(uint32_t row, uint32_t vec) const {
    const uint32_t group = by_tokens.quotient(row), token = row - group * num_tokens;
    return reinterpret_cast<const uint4*>(x) + 2 * (int64_t{token} * token_vecs + group * group_vecs + vec);
  }
  __device__ __forceinline__ void prefetch(uint32_t row, uint32_t vec) const { ptx::prefetch_l2(at(row, vec)); }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint4* from = at(row, vec);
    return {__ldg(from), __ldg(from + 1)};
  }
  __device__ __forceinline__ float row_factor(uint32_t) const { return 1.0f; }
  // One vector, rotated back; angles: the token's cosines, then its sines.
  __device__ __forceinline__ Vector16 vector_at(uint4 low, uint4 high, uint32_t vec, const float* angles) const {
    uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const float4* cosines = reinterpret_cast<const float4*>(angles) + 2 * ((vec & (head_vecs - 1)) - first_rope_vec);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 cos4 = cosines[half], sin4 = cosines[num_pairs / 4 + half];
      const float cos[4] = {cos4.x, cos4.y, cos4.z, cos4.w}, sin[4] = {sin4.x, sin4.y, sin4.z, sin4.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t& pair = pairs[4 * half + j];
        const float even = ptx::low_bf16(pair), odd = ptx::high_bf16(pair);
        pair = ptx::cvt_bf16x2(even * cos[j] + odd * sin[j], odd * cos[j] - even * sin[j]);
      }
    }
    return vector_of_pairs(pairs);
  }
  __device__ __forceinline__ Vector16 vector(const Raw& raw, uint32_t row, uint32_t vec, float) const {
    if (!rotated(vec)) return vector_of_pairs(raw.low, raw.high);
    return vector_at(raw.low, raw.high, vec, cos_sin + int64_t{positions[token_of(row)]} * (2 * num_pairs));
  }

  // Staged: vectors of whole heads, then the token's cosines and sines.
  __host__ bool stageable() const {
    return num_pairs > 0 && head_vecs <= 128 && reinterpret_cast<uintptr_t>(cos_sin) % 16 == 0;
  }
  __host__ uint32_t extra_bytes(uint32_t) const { return num_pairs * 8; }
  __device__ __forceinline__ int32_t ahead(uint32_t row) const { return positions[token_of(row)]; }
  __device__ __forceinline__ void queue(uint8_t* stage, uint64_t* barrier, uint32_t row, uint32_t first_vec,
                                        uint32_t count, int32_t position) const {
    ptx::mbarrier_arrive_expect_tx(barrier, count * kTraits.vec_bytes + num_pairs * 8);
    ptx::bulk_load(stage, at(row, first_vec), count * kTraits.vec_bytes, barrier);
    ptx::bulk_load(stage + count * kTraits.vec_bytes, cos_sin + int64_t{position} * (2 * num_pairs), num_pairs * 8,
                   barrier);
  }
  __device__ __forceinline__ void prefetch_piece(uint32_t row, uint32_t first_vec, uint32_t count) const {
    ptx::bulk_prefetch_l2(at(row, first_vec), count * kTraits.vec_bytes);
  }
  // Rotates in place.
  __device__ __forceinline__ void prepare(uint8_t* stage, uint32_t count) const {
    const auto* angles = reinterpret_cast<const float*>(stage + count * kTraits.vec_bytes);
    const uint32_t rope_vecs = head_vecs - first_rope_vec;
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < (count >> head_shift) * rope_vecs; i += 32) {
      const uint32_t head = by_rope_vecs.quotient(i),
                     vec = (head << head_shift) + first_rope_vec + i - head * rope_vecs;
      uint8_t* at = stage + vec * kTraits.vec_bytes;
      const auto* from = reinterpret_cast<const uint4*>(at);
      store_bf16_vector(at, vector_at(from[0], from[1], vec, angles));
    }
  }
  __device__ __forceinline__ Vector16 staged(const uint8_t* stage, uint32_t, uint32_t vec, float) const {
    return load_bf16_vector(stage + vec * kTraits.vec_bytes);
  }
};

}  // namespace

void inverse_rope_quantize(const InverseRopeQuantizeArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "inverse_rope_quantize";
  DSV4_GPU_REQUIRE(kOp, args.head_dim % 16 == 0 && (args.head_dim & (args.head_dim - 1)) == 0,
                   "head_dim = %d is not a power of two", args.head_dim);
  DSV4_GPU_REQUIRE(kOp, args.rope_dim % 16 == 0 && args.rope_dim <= args.head_dim, "rope_dim = %d", args.rope_dim);
  DSV4_GPU_REQUIRE(kOp, args.heads_per_group > 0 && args.num_heads % args.heads_per_group == 0,
                   "num_heads = %d, heads_per_group = %d", args.num_heads, args.heads_per_group);
  if (args.num_tokens == 0) return;
  InverseRopeSource source{};
  source.x = args.x;
  source.cos_sin = args.cos_sin;
  source.positions = args.positions;
  source.num_tokens = static_cast<uint32_t>(args.num_tokens);
  source.token_vecs = static_cast<uint32_t>(args.num_heads * args.head_dim / 16);
  source.group_vecs = static_cast<uint32_t>(args.heads_per_group * args.head_dim / 16);
  source.head_vecs = static_cast<uint32_t>(args.head_dim / 16);
  source.first_rope_vec = static_cast<uint32_t>((args.head_dim - args.rope_dim) / 16);
  source.num_pairs = static_cast<uint32_t>(args.rope_dim / 2);
  source.groups_by_rotation = args.head_dim == 512 && args.rope_dim <= 128 && args.heads_per_group % 8 == 0;
  source.by_tokens = gpu::FastDiv(source.num_tokens);
  source.by_rope_vecs = gpu::FastDiv(std::max(source.head_vecs - source.first_rope_vec, 1u));
  source.head_shift = static_cast<uint32_t>(std::countr_zero(source.head_vecs));
  launch_quantize(kOp, source, args.out, RowNorm{}, args.num_tokens * (args.num_heads / args.heads_per_group),
                  int64_t{args.heads_per_group} * args.head_dim, context);
}

}  // namespace dsv4
