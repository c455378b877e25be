// The shared expert's two GEMMs, each one launch: fc1 with SwiGLU, fc2.
//
// Few tokens (stream): weights are read once, straight into registers, the contraction split eight ways over two CTAs of four
// warpgroups; a cluster adds the parts through shared memory in a fixed order. Many tokens (tiles): a CTA of four warpgroups
// holds 256 weight rows times 128 tokens in registers; weights go straight from global memory through the decoder into the
// register operand of wgmma, token rows through shared memory, one block of 64 columns ahead.
#include <cooperative_groups.h>

#include "gpu/launch.h"
#include "gpu/ptx/mma.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/wgmma_rs.cuh"
#include "ops/moe/moe_decode_fp8_sm90.cuh"
#include "ops/moe/moe_shared_sm90.h"
#include "ops/moe/swiglu.h"

namespace dsv4::sm90 {
namespace {

namespace cg = cooperative_groups;

struct GemmArgs {
  const uint8_t* weights;
  const float* alpha;  // fc1: of w1, w3; fc2: of w2
  const bf16* rows;    // [num_tokens, cols]
  bf16* out;           // fc1: h [num_tokens, inter]; fc2: y [num_tokens, hidden]
  int num_tokens, cols, out_cols;
  float limit;
};

// One thread's 32 bytes of a block and the block's factors.
struct Fp8Operand {
  uint4 words[2];
  uint32_t factors;
  __device__ __forceinline__ void load(const uint8_t* block, int thread) {
    words[0] = __ldcs(reinterpret_cast<const uint4*>(block + thread * 16));
    words[1] = __ldcs(reinterpret_cast<const uint4*>(block + kMoeFp8HalfBytes + thread * 16));
    factors = __ldg(reinterpret_cast<const uint16_t*>(block + kMoeBlockCodeBytes));
  }
  __device__ __forceinline__ void decode(int half, uint32_t (&a)[2][4]) const {
    decode_fp8_half_block(words[half], factors, a);
  }
};

__device__ __forceinline__ uint32_t transpose_rows(uint32_t v) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return encode_bf16(low).bits | static_cast<uint32_t>(encode_bf16(high).bits) << 16;
}

// ---- few tokens ----

constexpr int kSplits = 8, kGroups = 4;  // parts of the contraction; warpgroups a CTA

template <int kTiles>
constexpr int kStreamSmem = kGroups * 4 * kTiles * 128 * static_cast<int>(sizeof(float));

// blockIdx.x / 2: strip, blockIdx.x % 2: CTA of the cluster; blockIdx.y: 8 * kTiles tokens.
template <bool kFc1, int kTiles>
__global__ void __launch_bounds__(128 * kGroups, 1) moe_shared_stream_kernel(const __grid_constant__ GemmArgs args) {
  constexpr int kAhead = kTiles <= 4 ? 4 : 2;  // blocks a thread has in flight, as registers allow
  extern __shared__ float4 partial[];          // [kGroups, 4 warps, kTiles, 32 lanes]
  const int strip = blockIdx.x / 2, rank = blockIdx.x % 2;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32,
            g = lane >> 2, t = lane & 3;
  const int part = rank * kGroups + group, blocks = args.cols / kMoeBlockCols, first_token = blockIdx.y * 8 * kTiles;
  const uint8_t* weights = args.weights + static_cast<int64_t>(strip) * blocks * kMoeFp8BlockBytes;
  Fp8Operand ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (part + i * kSplits < blocks)
      ahead[i].load(weights + static_cast<int64_t>(part + i * kSplits) * kMoeFp8BlockBytes, thread);
  ptx::griddepcontrol_wait();  // weights do not depend on anything
  ptx::griddepcontrol_launch_dependents();
  int rows[kTiles];  // offsets: at most kSharedStreamTokens rows
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    rows[tile] = min(first_token + tile * 8 + g, args.num_tokens - 1) * args.cols + 16 * t;
  float sum[kTiles][4] = {};
  for (int base = part; base < blocks; base += kAhead * kSplits)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int block = base + i * kSplits;
      if (block >= blocks) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        ahead[i].decode(half, a);
        if (half == 1 && block + kAhead * kSplits < blocks)
          ahead[i].load(weights + static_cast<int64_t>(block + kAhead * kSplits) * kMoeFp8BlockBytes, thread);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 v = reinterpret_cast<const uint4*>(args.rows + rows[tile] + block * kMoeBlockCols)[half];
          ptx::mma_m16n8k16_bf16(sum[tile], a[0], v.x, v.y);
          ptx::mma_m16n8k16_bf16(sum[tile], a[1], v.z, v.w);
        }
      }
    }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    partial[((group * 4 + warp) * kTiles + tile) * 32 + lane] =
        make_float4(sum[tile][0], sum[tile][1], sum[tile][2], sum[tile][3]);
  const auto cluster = cg::this_cluster();
  cluster.sync();
  // Part p finishes the tiles p, p + 8, ...: parts added in their order.
  for (int tile = part; tile < kTiles; tile += kSplits) {
    float v[4] = {};
    for (int p = 0; p < kSplits; ++p) {
      const float4* there = cluster.map_shared_rank(partial, p / kGroups);
      const float4 q = there[((p % kGroups * 4 + warp) * kTiles + tile) * 32 + lane];
      v[0] += q.x, v[1] += q.y, v[2] += q.z, v[3] += q.w;
    }
    for (int i = 0; i < 2; ++i) {
      const int token = first_token + tile * 8 + 2 * t + i;
      if (token >= args.num_tokens) continue;
      bf16* out = args.out + static_cast<int64_t>(token) * args.out_cols;
      if constexpr (kFc1) {
        out[moe_fc1_row(strip, warp, g)] = encode_bf16(
            swiglu(round_bf16(v[i] * args.alpha[0]), round_bf16(v[2 + i] * args.alpha[1]), 1.0f, args.limit));
      } else {
        const int column = moe_fc2_row(strip, warp, g);  // row g + 8 is two columns on
        out[column] = encode_bf16(v[i] * args.alpha[0]);
        out[column + 2] = encode_bf16(v[2 + i] * args.alpha[0]);
      }
    }
  }
  cluster.sync();  // the other CTA may still read
}

// ---- many tokens ----

constexpr int kTileTokens = 128;

// blockIdx.x: four strips; blockIdx.y: 128 tokens. h is kept in kernel column order (moe_layout.h) between the two.
template <bool kFc1>
__global__ void __launch_bounds__(128 * kGroups, 1) moe_shared_tiled_kernel(const __grid_constant__ GemmArgs args) {
  __shared__ alignas(1024) uint8_t operand[2][kTileTokens * 128];
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32,
            g = lane >> 2, t = lane & 3;
  const int blocks = args.cols / kMoeBlockCols, strips = args.out_cols / (kFc1 ? 32 : 64);
  const int strip = blockIdx.x * kGroups + group, first_token = blockIdx.y * kTileTokens;
  const bool used = strip < strips;
  const uint8_t* weights = args.weights + static_cast<int64_t>(used ? strip : strips - 1) * blocks * kMoeFp8BlockBytes;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  // This thread's two 16-byte chunks of a block of tokens: chunk `chunk` of rows row0 and row0 + 64.
  const int chunk = threadIdx.x % 8, row0 = threadIdx.x / 8;
  const uint32_t* source[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = min(first_token + row0 + 64 * i, args.num_tokens - 1);
    source[i] = reinterpret_cast<const uint32_t*>(args.rows + static_cast<int64_t>(token) * args.cols) +
                (kFc1 ? chunk : 4 * chunk);
  }
  uint4 rows[2];
  Fp8Operand next;
  const auto load = [&](int block) {
    next.load(weights + static_cast<int64_t>(block) * kMoeFp8BlockBytes, thread);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t* from = source[i] + block * 32;
      if constexpr (kFc1)
        rows[i] = make_uint4(from[0], from[8], from[16], from[24]);  // columns 16 t + 2 chunk
      else
        rows[i] = *reinterpret_cast<const uint4*>(from);
    }
  };
  load(0);
  float sum[kTileTokens / 2];
#pragma unroll
  for (int i = 0; i < kTileTokens / 2; ++i) sum[i] = 0.0f;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    uint8_t* buffer = operand[block & 1];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<uint4*>(buffer + (row0 + 64 * i) * 128 + ((chunk ^ (row0 & 7)) << 4)) = rows[i];
    uint32_t a[2][2][4];
    for (int half = 0; half < 2; ++half) next.decode(half, a[half]);
    ptx::fence_proxy_async();
    __syncthreads();
    if (block + 1 < blocks) load(block + 1);
    const uint32_t address = ptx::smem_address(buffer);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t descriptor =
          (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((address + step * 32) >> 4);
      Wgmma<kTileTokens>::mma(sum, a[step / 2][step % 2], descriptor);
    }
    wgmma_commit();
    wgmma_wait<0>();  // other warpgroups decode meanwhile
  }
  if (!used) return;
  const int tiles = min(kTileTokens / 8, (args.num_tokens - first_token + 7) / 8);
  const float alpha0 = args.alpha[0], alpha1 = kFc1 ? args.alpha[1] : alpha0;
#pragma unroll
  for (int tile = 0; tile < kTileTokens / 8; ++tile) {
    if (tile >= tiles) break;
    const int token = first_token + tile * 8 + g;  // after the transposition
    if constexpr (kFc1) {
      float h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        h[i] = swiglu(round_bf16(sum[tile * 4 + i] * alpha0), round_bf16(sum[tile * 4 + 2 + i] * alpha1), 1.0f,
                      args.limit);
      const uint32_t pair = transpose_rows(pack_pair(h[0], h[1]));
      if (token < args.num_tokens)
        *reinterpret_cast<uint32_t*>(args.out + static_cast<int64_t>(token) * args.out_cols + (strip >> 1) * 64 +
                                     ((strip & 1) * 4 + warp) * 8 + 2 * t) = pair;
    } else {
      const uint32_t low = transpose_rows(pack_pair(sum[tile * 4] * alpha0, sum[tile * 4 + 1] * alpha0));
      const uint32_t high = transpose_rows(pack_pair(sum[tile * 4 + 2] * alpha0, sum[tile * 4 + 3] * alpha0));
      if (token < args.num_tokens)
        *reinterpret_cast<uint2*>(args.out + static_cast<int64_t>(token) * args.out_cols + strip * 64 + warp * 16 +
                                  4 * t) = make_uint2(low, high);
    }
  }
}

template <bool kFc1, int kTiles>
void launch_stream(const GemmArgs& args, int strips, cudaStream_t stream) {
  const auto kernel = moe_shared_stream_kernel<kFc1, kTiles>;
  gpu::allow_smem(kernel, kStreamSmem<kTiles>);
  gpu::LaunchConfig config;
  config.grid =
      dim3(static_cast<unsigned>(2 * strips), static_cast<unsigned>((args.num_tokens + 8 * kTiles - 1) / (8 * kTiles)));
  config.block = 128 * kGroups;
  config.smem_bytes = kStreamSmem<kTiles>;
  config.cluster = 2;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(kernel, config, args);
}

template <bool kFc1>
void launch_gemm(const GemmArgs& args, cudaStream_t stream) {
  const int strips = args.out_cols / (kFc1 ? 32 : 64);
  if (args.num_tokens <= 8) return launch_stream<kFc1, 1>(args, strips, stream);
  if (args.num_tokens <= 16) return launch_stream<kFc1, 2>(args, strips, stream);
  if (args.num_tokens <= 32) return launch_stream<kFc1, 4>(args, strips, stream);
  if (args.num_tokens <= kSharedStreamTokens) return launch_stream<kFc1, 8>(args, strips, stream);
  gpu::LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((strips + kGroups - 1) / kGroups),
                     static_cast<unsigned>((args.num_tokens + kTileTokens - 1) / kTileTokens));
  config.block = 128 * kGroups;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_shared_tiled_kernel<kFc1>, config, args);
}

}  // namespace

void launch_moe_shared(const MoeSharedArgs& args, cudaStream_t stream) {
  const int num_tokens = static_cast<int>(args.num_tokens), inter = args.weights.inter;
  DSV4_GPU_REQUIRE("moe_shared", args.hidden % 64 == 0 && inter > 0 && inter % 64 == 0,
                   "hidden %d, inter %d: multiples of 64", args.hidden, inter);
  launch_gemm<true>(
      {args.weights.fc1, args.weights.alpha, args.x, args.h, num_tokens, args.hidden, inter, args.swiglu_limit},
      stream);
  launch_gemm<false>(
      {args.weights.fc2, args.weights.alpha + 2, args.h, args.y, num_tokens, inter, args.hidden, args.swiglu_limit},
      stream);
}

}  // namespace dsv4::sm90
