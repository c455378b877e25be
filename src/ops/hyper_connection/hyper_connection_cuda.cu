// hyper_connection_boundary: a cluster holds the mix matrix in its shared memories, 256 (or 512) channels of all four streams a CTA,
// and takes one tile of tokens after the other. Three all-to-all exchanges per tile: mix sums, squares of the collapsed row, and (for a
// computed row global) its amax; asynchronous stores into the other CTAs that count on an mbarrier there (a cluster barrier would also
// wait for the streams written to memory). A ninth warp runs Sinkhorn beside the eight that finish the row.
//
// Why the exchange buffers may be reused by the next tile: a CTA sends squares only after it has read the mix sums, and sends the next
// tile's mix sums only after it has read squares and amax; and to send either it must have received the other from every CTA.
#include <cmath>

#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "ops/hyper_connection/hyper_connection_gpu.h"
#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {
namespace {

constexpr int kComputeThreads = 256, kComputeWarps = kComputeThreads / 32;
constexpr int kThreads = kComputeThreads + 32;
constexpr int kMaxCluster = 16;
constexpr int kStreams = 4;
constexpr int kSquareLane = 24;  // of the 32 sums: 0..23 mix, 24 squares
constexpr uint32_t kComputeBarrier = 1, kAllBarrier = 2;

template <int kMix_, int kTokens_, int kChannelsPerThread_>
struct Traits {
  static constexpr int kMix = kMix_, kTokens = kTokens_, kPer = kChannelsPerThread_;
  static constexpr int kChannels = kComputeThreads * kPer;
  static constexpr bool kHead = kMix == kStreams;
  struct SharedStorage {
    alignas(8) uint64_t weights_barrier, mix_barrier, squares_barrier, amax_barrier;
    alignas(16) float fn[kMix][kStreams][kChannels];
    alignas(16) float rows[kTokens][kChannels];
    float warp_sums[kComputeWarps][kTokens][32];
    float cluster_sums[kMaxCluster][kTokens][32];
    double warp_squares[kComputeWarps][kTokens];
    double cluster_squares[kMaxCluster][kTokens];
    float warp_amax[kComputeWarps][kTokens];
    float cluster_amax[kMaxCluster][kTokens];
    float coefficients[kTokens][kStreams + kStreams * kStreams];
    float pre[kTokens][kStreams];
    float logits[kTokens][kStreams * kStreams];
  };
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// v[i] of all lanes summed; lane l returns the sum of v[l]. 31 exchanges instead of 160. Recursive, so that every index is a constant.
template <int kStep>
__device__ __forceinline__ float transpose_sum(float* v) {
  const bool upper = threadIdx.x & kStep;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const float sent = upper ? v[i] : v[i + kStep], kept = upper ? v[i + kStep] : v[i];
    v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kStep);
  }
  if constexpr (kStep > 1)
    return transpose_sum<kStep / 2>(v);
  else
    return v[0];
}

// One warp: the CTA's columns of every row of fn, a bulk copy per (mix, stream).
template <class T>
__device__ __forceinline__ void load_weights(const HcBoundaryArgs& args, uint32_t rank, typename T::SharedStorage& shared) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(&shared.weights_barrier, sizeof(shared.fn));
  __syncwarp();
#pragma unroll 1
  for (uint32_t row = lane; row < T::kMix * kStreams; row += 32)  // row = mix * 4 + stream
    ptx::bulk_load(&shared.fn[0][0][0] + row * T::kChannels, args.fn + int64_t{row} * args.hidden + rank * T::kChannels, T::kChannels * sizeof(float),
                   &shared.weights_barrier, ptx::L2Hint::kEvictLast);
}

// New streams of the tile's tokens, in registers and (with a sub-layer output) in memory. Absent tokens give zeros. Everything is
// loaded before the first store: stores may alias the loads, so that the compiler would not hoist one above the other.
template <class T>
__device__ __forceinline__ void spread(const HcBoundaryArgs& args, int64_t first_token, uint32_t rank, float (&x)[T::kTokens][kStreams][T::kPer],
                                       typename T::SharedStorage& shared) {
  const int64_t channel = rank * T::kChannels + threadIdx.x;
  constexpr int kCoefficients = kStreams + kStreams * kStreams;
  float out[T::kTokens][T::kPer];
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
    const int64_t token = first_token + t;
    const bool valid = token < args.num_tokens;
#pragma unroll
    for (int c = 0; c < T::kPer; ++c) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j)
        x[t][j][c] = valid ? decode_bf16(args.streams[(token * kStreams + j) * args.hidden + channel + c * kComputeThreads]) : 0.0f;
      out[t][c] = valid && args.sublayer_out ? decode_bf16(args.sublayer_out[token * args.hidden + channel + c * kComputeThreads]) : 0.0f;
    }
  }
  if (!args.sublayer_out) return;
  for (int i = static_cast<int>(threadIdx.x); i < T::kTokens * kCoefficients; i += kComputeThreads) {
    const int64_t token = first_token + i / kCoefficients;
    const int which = i % kCoefficients;
    if (token < args.num_tokens)
      shared.coefficients[i / kCoefficients][which] = which < kStreams ? args.post[token * kStreams + which] : args.comb[token * kStreams * kStreams + which - kStreams];
  }
  ptx::named_barrier_sync(kComputeBarrier, kComputeThreads);
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
    if (first_token + t >= args.num_tokens) continue;
#pragma unroll
    for (int c = 0; c < T::kPer; ++c) {
      float fresh[kStreams];
#pragma unroll
      for (int k = 0; k < kStreams; ++k) {
        float sum = shared.coefficients[t][k] * out[t][c];
#pragma unroll
        for (int j = 0; j < kStreams; ++j) sum = __fmaf_rn(shared.coefficients[t][kStreams + kStreams * j + k], x[t][j][c], sum);
        const bf16 rounded = encode_bf16(sum);
        args.streams_out[((first_token + t) * kStreams + k) * args.hidden + channel + c * kComputeThreads] = rounded;
        fresh[k] = decode_bf16(rounded);
      }
#pragma unroll
      for (int k = 0; k < kStreams; ++k) x[t][k][c] = fresh[k];
    }
  }
}

// Sum over the cluster of what cluster_sums holds for this lane.
template <class T>
__device__ __forceinline__ float mix_value(const HcBoundaryArgs& args, int t, uint32_t cluster, const typename T::SharedStorage& shared) {
  const uint32_t lane = threadIdx.x % 32;
  float sum = 0;
  for (uint32_t r = 0; r < cluster; ++r) sum += shared.cluster_sums[r][t][lane];
  const float squares = __shfl_sync(0xffffffffu, sum, kSquareLane);
  return sum * __frcp_rn(__fsqrt_rn(squares / static_cast<float>(kStreams * args.hidden) + args.rms_eps));
}

// 1/d[i] for four numbers with one reciprocal: the special-function unit takes a warp's worth in eight clocks, and this chain is
// the longest of the kernel.
__device__ __forceinline__ void reciprocals(const float (&d)[4], float (&r)[4]) {
  const float d01 = d[0] * d[1], d23 = d[2] * d[3], all = ptx::rcp_approx(d01 * d23), r01 = all * d23, r23 = all * d01;
  r[0] = r01 * d[1], r[1] = r01 * d[0], r[2] = r23 * d[3], r[3] = r23 * d[2];
}

// Rows, then columns, each divided by its sum + eps; c is row-major.
__device__ __forceinline__ void sinkhorn(float (&c)[16], int iters, float eps) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float max = fmaxf(fmaxf(c[4 * j], c[4 * j + 1]), fmaxf(c[4 * j + 2], c[4 * j + 3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) c[4 * j + k] = expf(c[4 * j + k] - max);
    const float factor = __frcp_rn((c[4 * j] + c[4 * j + 1]) + (c[4 * j + 2] + c[4 * j + 3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) c[4 * j + k] = c[4 * j + k] * factor + eps;
  }
  float d[4], r[4];
  const auto columns = [&] {
#pragma unroll
    for (int k = 0; k < 4; ++k) d[k] = (c[k] + c[4 + k]) + (c[8 + k] + (c[12 + k] + eps));
    reciprocals(d, r);
#pragma unroll
    for (int i = 0; i < 16; ++i) c[i] *= r[i % 4];
  };
  columns();
#pragma unroll 1
  for (int iter = 1; iter < iters; ++iter) {
#pragma unroll
    for (int j = 0; j < 4; ++j) d[j] = (c[4 * j] + c[4 * j + 1]) + (c[4 * j + 2] + (c[4 * j + 3] + eps));
    reciprocals(d, r);
#pragma unroll
    for (int i = 0; i < 16; ++i) c[i] *= r[i / 4];
    columns();
  }
}

// The ninth warp of the cluster's first CTA: post of the tile's tokens, and the logits of comb.
template <class T>
__device__ __forceinline__ void write_post(const HcBoundaryArgs& args, int64_t first_token, uint32_t cluster, typename T::SharedStorage& shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
    const float m = mix_value<T>(args, t, cluster, shared);
    const bool valid = first_token + t < args.num_tokens;
    if (valid && lane >= 4 && lane < 8) args.post_out[(first_token + t) * kStreams + lane - 4] = 2.0f * sigmoid(m * args.scale[1] + args.base[lane]);
    if (lane >= 8 && lane < 24) shared.logits[t][lane - 8] = m * args.scale[2] + args.base[lane];
  }
  __syncwarp();
}

// The same warp: Sinkhorn, a token a lane.
template <class T>
__device__ __forceinline__ void write_comb(const HcBoundaryArgs& args, int64_t first_token, typename T::SharedStorage& shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane < T::kTokens && first_token + lane < args.num_tokens) {
    float c[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) c[i] = shared.logits[lane][i];
    sinkhorn(c, args.sinkhorn_iters, args.hc_eps);
    auto* to = reinterpret_cast<float4*>(args.comb_out + (first_token + lane) * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]};
  }
  __syncwarp();
}

// Mix sums of the tile: over the thread's channels, the warp, the CTA; sent to every CTA of the cluster.
template <class T>
__device__ __forceinline__ void mix(const float (&x)[T::kTokens][kStreams][T::kPer], uint32_t rank, uint32_t cluster, typename T::SharedStorage& shared) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sums[T::kTokens][32] = {};
#pragma unroll
  for (int k = 0; k < T::kMix; ++k)
#pragma unroll
    for (int j = 0; j < kStreams; ++j)
#pragma unroll
      for (int c = 0; c < T::kPer; ++c) {
        const float w = shared.fn[k][j][threadIdx.x + c * kComputeThreads];
#pragma unroll
        for (int t = 0; t < T::kTokens; ++t) sums[t][k] = __fmaf_rn(w, x[t][j][c], sums[t][k]);
      }
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
#pragma unroll
    for (int j = 0; j < kStreams; ++j)
#pragma unroll
      for (int c = 0; c < T::kPer; ++c) sums[t][kSquareLane] = __fmaf_rn(x[t][j][c], x[t][j][c], sums[t][kSquareLane]);
    shared.warp_sums[warp][t][lane] = transpose_sum<16>(sums[t]);
  }
  ptx::named_barrier_sync(kComputeBarrier, kComputeThreads);
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kComputeWarps; ++w) sum += shared.warp_sums[w][t][lane];
    for (uint32_t r = warp; r < cluster; r += kComputeWarps)
      ptx::store_async_cluster_f32(ptx::map_to_cta(&shared.cluster_sums[rank][t][lane], r), sum, ptx::map_to_cta(&shared.mix_barrier, r));
  }
}

// Sum of squares (binary64) and amax of every token's row slice, to every CTA. Returns after the CTA's own part is sent.
template <class T>
__device__ __forceinline__ void send_squares(const float (&y)[T::kTokens][T::kPer], uint32_t rank, uint32_t cluster, typename T::SharedStorage& shared) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
    double sum = 0;
#pragma unroll
    for (int c = 0; c < T::kPer; ++c) sum = __fma_rn(static_cast<double>(y[t][c]), static_cast<double>(y[t][c]), sum);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) shared.warp_squares[warp][t] = sum;
  }
  ptx::named_barrier_sync(kAllBarrier, kThreads);  // the ninth warp arrives once it has read the mix sums
  if (threadIdx.x < cluster * T::kTokens) {
    const uint32_t to = threadIdx.x / T::kTokens, t = threadIdx.x % T::kTokens;
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kComputeWarps; ++w) sum += shared.warp_squares[w][t];
    ptx::store_async_cluster_f64(ptx::map_to_cta(&shared.cluster_squares[rank][t], to), sum, ptx::map_to_cta(&shared.squares_barrier, to));
  }
}
template <class T>
__device__ __forceinline__ void send_amax(const float (&y)[T::kTokens][T::kPer], uint32_t rank, uint32_t cluster, typename T::SharedStorage& shared) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
    float amax = 0;
#pragma unroll
    for (int c = 0; c < T::kPer; ++c) amax = fmaxf(amax, fabsf(y[t][c]));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    if (lane == 0) shared.warp_amax[warp][t] = amax;
  }
  ptx::named_barrier_sync(kComputeBarrier, kComputeThreads);
  if (threadIdx.x < cluster * T::kTokens) {
    const uint32_t to = threadIdx.x / T::kTokens, t = threadIdx.x % T::kTokens;
    float amax = 0;
#pragma unroll
    for (int w = 0; w < kComputeWarps; ++w) amax = fmaxf(amax, shared.warp_amax[w][t]);
    ptx::store_async_cluster_f32(ptx::map_to_cta(&shared.cluster_amax[rank][t], to), amax, ptx::map_to_cta(&shared.amax_barrier, to));
  }
}

template <class T>
__device__ __forceinline__ void write_rows(const HcBoundaryArgs& args, const QuantizeShape& shape, int64_t first_token, uint32_t rank, uint32_t cluster,
                                           const float (&y)[T::kTokens][T::kPer], typename T::SharedStorage& shared) {
  constexpr int kVecs = T::kChannels / 16;  // of a token's slice
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t)
#pragma unroll
    for (int c = 0; c < T::kPer; ++c) shared.rows[t][threadIdx.x + c * kComputeThreads] = y[t][c];
  ptx::named_barrier_sync(kComputeBarrier, kComputeThreads);
  // A warp stays within one token: kVecs is 16 or 32, so for 16 only the lower half of its lanes have a vector.
  constexpr int kWarpsPerToken = (kVecs + 31) / 32;
  for (int job = static_cast<int>(threadIdx.x / 32); job < T::kTokens * kWarpsPerToken; job += kComputeWarps) {
    const int t = job / kWarpsPerToken, vec = static_cast<int>(threadIdx.x % 32);
    const int64_t token = first_token + t;
    const bool valid = vec < kVecs && token < args.num_tokens;
    const auto row = static_cast<uint32_t>(token < args.num_tokens ? token : 0);
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = valid ? shared.rows[t][16 * vec + i] : 0.0f;
    float global = 1.0f;
    if (args.out.global_mode == GlobalMode::kGiven) global = args.out.global[0];
    if (args.out.global_mode == GlobalMode::kPerRow) global = args.out.global[row];
    if (args.out.global_mode == GlobalMode::kComputeRow) {
      float amax = 0;
      for (uint32_t r = 0; r < cluster; ++r) amax = fmaxf(amax, shared.cluster_amax[r][t]);
      global = nvfp4_global_scale(amax).value;
      if (valid && vec == 0 && rank == 0) args.out.row_global[token] = global;
    }
    write_vector(args.out, shape, row, rank * kVecs + vec, valid, x, vector_amax(x), global, nvfp4_rcp6({global}));
  }
}

// The eight warps that own the channels. parity: of this tile's exchanges.
template <class T>
__device__ __forceinline__ void run_tile(const HcBoundaryArgs& args, const QuantizeShape& shape, int64_t first_token, uint32_t rank, uint32_t cluster, uint32_t parity,
                                         bool first, typename T::SharedStorage& shared) {
  const bool computes_global = args.out.global_mode == GlobalMode::kComputeRow;
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&shared.mix_barrier, cluster * sizeof(shared.cluster_sums[0]));
    ptx::mbarrier_arrive_expect_tx(&shared.squares_barrier, cluster * sizeof(shared.cluster_squares[0]));
    if (computes_global) ptx::mbarrier_arrive_expect_tx(&shared.amax_barrier, cluster * sizeof(shared.cluster_amax[0]));
  }
  float x[T::kTokens][kStreams][T::kPer], norm_weight[T::kPer];
#pragma unroll
  for (int c = 0; c < T::kPer; ++c)  // long before its use
    norm_weight[c] = args.norm_weight ? decode_bf16(args.norm_weight[rank * T::kChannels + threadIdx.x + c * kComputeThreads]) : 0.0f;
  spread<T>(args, first_token, rank, x, shared);
  if (first) {
    ptx::mbarrier_wait(&shared.weights_barrier, 0);
    ptx::cluster_wait();  // every CTA runs and has its barriers
  }
  mix<T>(x, rank, cluster, shared);
  if (threadIdx.x / 32 < T::kTokens) {
    const int t = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    ptx::mbarrier_wait_cluster(&shared.mix_barrier, parity);
    const float m = mix_value<T>(args, t, cluster, shared);
    if (lane < kStreams) shared.pre[t][lane] = sigmoid(m * args.scale[0] + args.base[lane]) + args.hc_eps;
  }
  ptx::named_barrier_sync(kComputeBarrier, kComputeThreads);
  float y[T::kTokens][T::kPer];
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t)
#pragma unroll
    for (int c = 0; c < T::kPer; ++c) {
      float sum = shared.pre[t][0] * x[t][0][c];
#pragma unroll
      for (int j = 1; j < kStreams; ++j) sum = __fmaf_rn(shared.pre[t][j], x[t][j][c], sum);
      y[t][c] = round_bf16(sum);
    }
  send_squares<T>(y, rank, cluster, shared);
  ptx::mbarrier_wait_cluster(&shared.squares_barrier, parity);
  if (args.norm_weight) {
#pragma unroll
    for (int t = 0; t < T::kTokens; ++t) {
      double sum = 0;
      for (uint32_t r = 0; r < cluster; ++r) sum += shared.cluster_squares[r][t];
      const float factor = __frcp_rn(__fsqrt_rn(static_cast<float>(sum) / static_cast<float>(args.hidden) + args.rms_eps));
#pragma unroll
      for (int c = 0; c < T::kPer; ++c) y[t][c] = round_bf16(norm_weight[c] * (y[t][c] * factor));
    }
  }
  if (computes_global) {
    send_amax<T>(y, rank, cluster, shared);
    ptx::mbarrier_wait_cluster(&shared.amax_barrier, parity);
  }
  write_rows<T>(args, shape, first_token, rank, cluster, y, shared);
  ptx::named_barrier_sync(kComputeBarrier, kComputeThreads);  // shared.rows and pre are free again
}

// The ninth warp: in the cluster's first CTA post and comb, in the others nothing but arriving.
template <class T>
__device__ __forceinline__ void run_tile_ninth_warp(const HcBoundaryArgs& args, int64_t first_token, uint32_t rank, uint32_t cluster, uint32_t parity, bool first,
                                                    typename T::SharedStorage& shared) {
  const bool mixes = !T::kHead && rank == 0;
  if (first) ptx::cluster_wait();
  ptx::mbarrier_wait_cluster(&shared.mix_barrier, parity);  // in every CTA: keeps this warp in step with the others
  if (mixes) write_post<T>(args, first_token, cluster, shared);
  ptx::named_barrier_arrive(kAllBarrier, kThreads);  // mix sums have been read
  if (mixes) write_comb<T>(args, first_token, shared);
}

template <class T>
__global__ void __launch_bounds__(kThreads, T::kPer == 1 ? 2 : 1) boundary_kernel(const HcBoundaryArgs args, const QuantizeShape shape, uint32_t cluster) {
  extern __shared__ __align__(16) uint8_t storage[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(storage);
  const uint32_t rank = ptx::cluster_cta_rank();
  const bool computes = threadIdx.x < kComputeThreads;
  if (threadIdx.x == kComputeThreads) {
    for (uint64_t* barrier : {&shared.weights_barrier, &shared.mix_barrier, &shared.squares_barrier, &shared.amax_barrier}) ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::cluster_arrive();
  if (!computes) load_weights<T>(args, rank, shared);  // weights do not depend on the predecessor
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t num_tiles = (args.num_tokens + T::kTokens - 1) / T::kTokens, num_clusters = gridDim.x / cluster;
  bool first = true;
  uint32_t parity = 0;
  for (int64_t tile = blockIdx.x / cluster; tile < num_tiles; tile += num_clusters) {
    if (computes)
      run_tile<T>(args, shape, tile * T::kTokens, rank, cluster, parity, first, shared);
    else
      run_tile_ninth_warp<T>(args, tile * T::kTokens, rank, cluster, parity, first, shared);
    first = false;
    parity ^= 1;
  }
  if (computes) zero_sf_padding(args.out, shape, blockIdx.x * kComputeThreads + threadIdx.x, gridDim.x * kComputeThreads);
}

template <class T>
void run(const HcBoundaryArgs& args, const QuantizeShape& shape, const GpuContext& context) {
  constexpr int kSmem = sizeof(typename T::SharedStorage);
  const auto cluster = static_cast<int>(args.hidden / T::kChannels);
  static const bool prepared = [] {
    gpu::allow_smem(boundary_kernel<T>, kSmem);
    gpu::allow_large_cluster(boundary_kernel<T>);
    return true;
  }();
  (void)prepared;
  const int64_t tiles = (args.num_tokens + T::kTokens - 1) / T::kTokens;
  const int64_t most = context.num_sms * (kSmem <= 110 * 1024 ? 2 : 1) / cluster;  // more would only queue
  const int64_t clusters = tiles < most ? tiles : most < 1 ? 1 : most;
  gpu::launch(boundary_kernel<T>,
              {.grid = static_cast<uint32_t>(clusters * cluster), .block = kThreads, .smem_bytes = kSmem, .stream = context.stream, .cluster = cluster, .dependent = context.dependent},
              args, shape, static_cast<uint32_t>(cluster));
}

}  // namespace

void hyper_connection_boundary(const HcBoundaryArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "hyper_connection_boundary";
  const bool narrow = args.hidden % 256 == 0 && args.hidden / 256 <= kMaxCluster;
  DSV4_GPU_REQUIRE(kOp, args.hidden >= 512 && (narrow || (args.hidden % 512 == 0 && args.hidden / 512 <= kMaxCluster)), "hidden = %lld", static_cast<long long>(args.hidden));
  DSV4_GPU_REQUIRE(kOp, args.num_tokens >= 0 && args.num_tokens * (args.hidden / 16) < (int64_t{1} << 31), "num_tokens = %lld", static_cast<long long>(args.num_tokens));
  DSV4_GPU_REQUIRE(kOp, args.out.format == RowFormat::kBf16 ? args.out.y != nullptr : args.out.codes && args.out.sf, "an output pointer is null");
  DSV4_GPU_REQUIRE(kOp, !args.sublayer_out || (args.post && args.comb && args.streams_out), "post, comb or streams_out is null");
  DSV4_GPU_REQUIRE(kOp, args.sinkhorn_iters >= 1, "sinkhorn_iters = %d", args.sinkhorn_iters);
  if (args.num_tokens == 0) return;
  const QuantizeShape shape = make_quantize_shape(args.out, args.num_tokens, args.hidden);
  const bool many = args.num_tokens > (narrow ? 8 : 4);  // two tokens a tile halve the clusters: eight of 14 CTAs do not fit at once
  if (args.head)
    narrow ? run<Traits<4, 1, 1>>(args, shape, context) : run<Traits<4, 1, 2>>(args, shape, context);
  else if (many)
    narrow ? run<Traits<24, 2, 1>>(args, shape, context) : run<Traits<24, 2, 2>>(args, shape, context);
  else
    narrow ? run<Traits<24, 1, 1>>(args, shape, context) : run<Traits<24, 1, 2>>(args, shape, context);
}

}  // namespace dsv4
