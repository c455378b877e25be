// inverse_rope_quantize: attention output, rotated back by the query's position, quantised in the grouped layout.
#include "ops/quantize/quantize_gpu.h"
#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {
namespace {

struct InverseRopeSource {
  const bf16* x;
  const float* cos_sin;
  const int32_t* positions;
  uint32_t num_tokens, token_vecs, group_vecs;
  uint32_t head_vecs_mask, first_rope_vec;  // head_dim / 16 is a power of two
  uint32_t num_pairs;
  bool groups_by_rotation;
  gpu::FastDiv by_tokens;

  using Shared = NoShared;
  static constexpr uint32_t kMaxVecsPerThread = 4, kMinCtas = 4;
  __device__ __forceinline__ void prepare(Shared&) {}
  struct Raw {
    uint4 low, high;
  };
  // Eight heads of 32 vectors a CTA: the aligned eights that hold the rotated channels go to two warps, so that six have no rotation.
  __device__ __forceinline__ uint32_t order(uint32_t thread) const {
    if (!groups_by_rotation) return thread;
    return thread < 192 ? thread / 24 * 32 + thread % 24 : (thread - 192) / 8 * 32 + 24 + thread % 8;
  }
  __device__ __forceinline__ bool rotated(uint32_t vec) const { return (vec & head_vecs_mask) >= first_rope_vec; }
  __device__ __forceinline__ Raw load(uint32_t row, uint32_t vec) const {
    const uint32_t group = by_tokens.quotient(row), token = row - group * num_tokens;
    const uint4* at = reinterpret_cast<const uint4*>(x) + 2 * (int64_t{token} * token_vecs + group * group_vecs + vec);
    return {__ldg(at), __ldg(at + 1)};
  }
  __device__ __forceinline__ void values(const Raw& raw, uint32_t row, uint32_t vec, float (&out)[16]) const {
    widen_bf16x16(raw.low, raw.high, out);
    if (!rotated(vec)) return;
    const uint32_t token = row - by_tokens.quotient(row) * num_tokens;
    const float* cosines = cos_sin + int64_t{positions[token]} * (2 * num_pairs) + 8 * ((vec & head_vecs_mask) - first_rope_vec);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 cos4 = __ldg(reinterpret_cast<const float4*>(cosines) + half), sin4 = __ldg(reinterpret_cast<const float4*>(cosines + num_pairs) + half);
      const float cos[4] = {cos4.x, cos4.y, cos4.z, cos4.w}, sin[4] = {sin4.x, sin4.y, sin4.z, sin4.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 8 * half + 2 * j;
        const float even = out[at], odd = out[at + 1];
        const uint32_t pair = ptx::cvt_bf16x2(even * cos[j] + odd * sin[j], odd * cos[j] - even * sin[j]);
        out[at] = ptx::low_bf16(pair);
        out[at + 1] = ptx::high_bf16(pair);
      }
    }
  }
};

}  // namespace

void inverse_rope_quantize(const InverseRopeQuantizeArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "inverse_rope_quantize";
  DSV4_GPU_REQUIRE(kOp, args.head_dim % 16 == 0 && (args.head_dim & (args.head_dim - 1)) == 0, "head_dim = %d is not a power of two", args.head_dim);
  DSV4_GPU_REQUIRE(kOp, args.rope_dim % 16 == 0 && args.rope_dim <= args.head_dim, "rope_dim = %d", args.rope_dim);
  DSV4_GPU_REQUIRE(kOp, args.heads_per_group > 0 && args.num_heads % args.heads_per_group == 0, "num_heads = %d, heads_per_group = %d", args.num_heads,
                   args.heads_per_group);
  if (args.num_tokens == 0) return;
  InverseRopeSource source{};
  source.x = args.x;
  source.cos_sin = args.cos_sin;
  source.positions = args.positions;
  source.num_tokens = static_cast<uint32_t>(args.num_tokens);
  source.token_vecs = static_cast<uint32_t>(args.num_heads * args.head_dim / 16);
  source.group_vecs = static_cast<uint32_t>(args.heads_per_group * args.head_dim / 16);
  source.head_vecs_mask = static_cast<uint32_t>(args.head_dim / 16 - 1);
  source.first_rope_vec = static_cast<uint32_t>((args.head_dim - args.rope_dim) / 16);
  source.num_pairs = static_cast<uint32_t>(args.rope_dim / 2);
  source.groups_by_rotation = args.head_dim == 512 && args.rope_dim <= 128 && args.heads_per_group % 8 == 0;
  source.by_tokens = gpu::FastDiv(source.num_tokens);
  launch_quantize(kOp, source, args.out, RowNorm{}, args.num_tokens * (args.num_heads / args.heads_per_group),
                     int64_t{args.heads_per_group} * args.head_dim, context);
}

}  // namespace dsv4
