// hyper_connection_boundary: a cluster holds the mix matrix, 256 (448, 512) channels of all four streams a CTA, and takes one tile of eight
// tokens after the other. The mix is a matrix product on the tensor cores (rows: mix, columns: tokens); streams are bf16, so that only the
// weights need splitting: each enters as the sum of two bf16, which keeps 2^-18 of it.
//
// Lane 4 n + q of a compute warp owns token n of the tile and eight channels, in every step: the bf16 pairs of the new streams are the
// product's B fragments as they are, and stay in registers until the row is collapsed. Two all-to-all exchanges a tile (three with a computed
// row global) go through distributed shared memory: asynchronous stores into the other CTAs that count on an mbarrier there (a cluster barrier
// would also wait for the streams written to memory). A team is eight (14, 16) compute warps and one more, which writes post and
// comb of the tiles this CTA owns, beside the warps that finish the rows. Few tokens: one team with its weights in registers. Many: two teams
// with tiles of their own and the weights in shared memory, because a team alone waits most of the time. Very few, and nothing written over
// what is read: two clusters share a tile (and have no other), because a cluster sits in one GPC, whose way to L2 bounds the weights' load.
//
// Why the exchange buffers may be reused: a CTA's steps are spread and mix (i), finish (i - 1), collapse (i), and there are two of each buffer.
// Another CTA sends mix sums (i + 2) after it has squares (i) of this one, sent after mix sums (i) were read; and squares (i + 2) after it has
// mix sums (i + 2), sent after squares (i) were read. Sums for the last warp: it has read them before this CTA's squares of that tile go out.
// No CTA sends what a phase of an mbarrier here counts before that phase is the current one, by the same order.
//
// Waits on these mbarriers have CTA scope. The memory model asks for cluster scope, which on the hardware adds an invalidation of L1 (seen in
// the machine code, and in time: spilled registers live there) and nothing for shared memory.
//
// Here: the exchanges, the order of a tile's steps, the launch. Layout of a cluster: boundary_traits.cuh; a CTA's own part: boundary_mix.cuh.
#include <algorithm>
#include <cmath>

#include "gpu/launch.h"
#include "ops/hyper_connection/boundary_mix.cuh"
#include "ops/hyper_connection/sinkhorn_device.cuh"
#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {

using namespace hc;

namespace {

// Within 1e-6: the exact operations cost 200 clocks on the way from one exchange to the next.
__device__ __forceinline__ float sigmoid(float x) { return ptx::rcp_approx(1.0f + ptx::exp2_approx(-1.44269504f * x)); }

// Sums over the CTA's warps go out: pre and squares to every CTA (kComb: squares to the owner), the rest to the tile's owner.
template <class T>
__device__ __forceinline__ void send_mix(const Place& place, uint32_t owner, uint32_t parity, typename T::Team& team) {
  const auto total = [&](uint32_t i) {
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < T::kWarps; ++w) sum[w % 4] += (&team.warp_sums[w][0][0])[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  };
  const uint32_t lane = place.lane, warp = place.warp;
  constexpr uint32_t kHalf = T::kWarps / 2;
  const auto send_square = [&](uint32_t to) {
    ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_sums[parity][place.rank][kPreSums + lane % 8], to),
                                 total(T::kMix * kTileTokens + lane % 8),
                                 ptx::map_to_cta(&team.mix_barrier[parity], to));
  };
  if constexpr (!T::kCollapses) {
    if (place.thread < kTileTokens) send_square(owner);
  } else if (warp < kHalf) {
    const float pre = total(lane);
#pragma unroll
    for (uint32_t r = warp; r < kMaxCluster; r += kHalf)
      if (r < place.cluster)
        ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_sums[parity][place.rank][lane], r), pre,
                                     ptx::map_to_cta(&team.mix_barrier[parity], r));
  } else if (warp < kHalf + 4) {
    if (const uint32_t r = (warp - kHalf) * 4 + lane / 8; r < place.cluster) send_square(r);
  }
  if (const int i = static_cast<int>(place.thread); i < T::kOwnerSums)
    ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_post_comb[place.rank][T::kFirstSum + i], owner),
                                 total((T::kCollapses ? kPreSums : 0) + i),
                                 ptx::map_to_cta(&team.owner_barrier, owner));
}

// x / hidden, correctly rounded: a quotient within one unit in the last place, corrected once (Markstein).
struct DivisionByHidden {
  float hidden, reciprocal;
  __device__ __forceinline__ float operator()(float x) const {
    const float quotient = x * reciprocal;
    return __fmaf_rn(__fmaf_rn(-quotient, hidden, x), reciprocal, quotient);
  }
};

// 1 / rms of a token's streams: lanes that differ in the bits of kBit, 2 kBit hold the same token and share the work.
template <int kBit>
__device__ __forceinline__ float rms_factor(const float (&sums)[kMaxCluster][kPreSums + kTileTokens], uint32_t part,
                                            int token, DivisionByHidden division, float eps) {
  const float* of_token = &sums[part * 4][kPreSums + token];
  constexpr int kPitch = kPreSums + kTileTokens;
  float squares = (of_token[0] + of_token[kPitch]) + (of_token[2 * kPitch] + of_token[3 * kPitch]);
  squares += __shfl_xor_sync(0xffffffffu, squares, kBit);
  squares += __shfl_xor_sync(0xffffffffu, squares, 2 * kBit);
  return ptx::rsqrt_approx(__fmaf_rn(squares, 0.25f * division.reciprocal, eps));
}

// pre of the lane's token, from all CTAs' sums.
__device__ __forceinline__ void collapse_weights(const float (&sums)[kMaxCluster][kPreSums + kTileTokens],
                                                 const Place& place, float rms, float scale, float base, float eps,
                                                 float (&pre)[kStreams]) {
  float sum[4] = {};
#pragma unroll
  for (int r = 0; r < kMaxCluster; ++r) sum[r % 4] += sums[r][place.quarter * kTileTokens + place.token];
  const float own = sigmoid(((sum[0] + sum[1]) + (sum[2] + sum[3])) * rms * scale + base) + eps;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) pre[j] = __shfl_sync(0xffffffffu, own, j, 4);
}

// Sum of squares (binary64) of the collapsed row's slice, to every CTA.
template <class T>
__device__ __forceinline__ void send_squares(const Place& place, const uint32_t (&y)[4], bool owner, uint32_t parity,
                                             typename T::Team& team) {
  double evens = 0, odds = 0;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const double even = ptx::low_bf16(y[pair]), odd = ptx::high_bf16(y[pair]);
    evens = __fma_rn(even, even, evens);
    odds = __fma_rn(odd, odd, odds);
  }
  double sum = evens + odds;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (place.quarter == 0) team.warp_squares[place.warp][place.token] = sum;
  ptx::async_copy_wait<0>();  // the next tile's coefficients are for all threads
  if (owner && T::kOwnerSums > 0)
    ptx::named_barrier_sync(kAllBarrier + 2 * place.team, T::kTeamThreads + 32);  // the last warp has read the mix sums
  else
    team_sync<T>(place);
  if (place.thread < place.cluster * kTileTokens) {
    const uint32_t to = place.thread / kTileTokens, t = place.thread % kTileTokens;
    double sums[4] = {};
#pragma unroll
    for (int w = 0; w < T::kWarps; ++w) sums[w % 4] += team.warp_squares[w][t];
    ptx::store_async_cluster_f64(ptx::map_to_cta(&team.cluster_squares[parity][place.rank][t], to),
                                 (sums[0] + sums[1]) + (sums[2] + sums[3]),
                                 ptx::map_to_cta(&team.squares_barrier[parity], to));
  }
}

template <class T>
__device__ __forceinline__ void send_amax(const Place& place, const uint32_t (&y)[4], typename T::Team& team) {
  if (place.thread == 0)
    ptx::mbarrier_arrive_expect_tx(&team.amax_barrier, place.cluster * sizeof(team.cluster_amax[0]));
  float amax = 0;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)
    amax = fmaxf(amax, fmaxf(fabsf(ptx::low_bf16(y[pair])), fabsf(ptx::high_bf16(y[pair]))));
  amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
  if (place.quarter == 0) team.warp_amax[place.warp][place.token] = amax;
  team_sync<T>(place);
  if (place.thread < place.cluster * kTileTokens) {
    const uint32_t to = place.thread / kTileTokens, t = place.thread % kTileTokens;
    float largest = 0;
#pragma unroll
    for (int w = 0; w < T::kWarps; ++w) largest = fmaxf(largest, team.warp_amax[w][t]);
    ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_amax[place.rank][t], to), largest,
                                 ptx::map_to_cta(&team.amax_barrier, to));
  }
}

// NVFP4 and FP8 rows: through shared memory, because a scale's group spans lanes and (FP8) warps.
template <class T>
__device__ __forceinline__ void write_quantized(const HcBoundaryArgs& args, const QuantizeShape& shape,
                                                const Place& place, int first_token, const uint32_t (&y)[4],
                                                typename T::Team& team) {
  constexpr uint32_t kVecs = T::kChannels / 16;  // of a token's slice
  store_pairs(&team.rows[place.token][place.channel], y);
  team_sync<T>(place);
  if (place.thread >= kTileTokens * kVecs) return;  // whole warps
  const uint32_t t = place.thread / kVecs, vec = place.thread % kVecs;
  const bool valid = first_token + t < args.num_tokens;
  const auto row = static_cast<uint32_t>(valid ? first_token + t : 0);
  const auto* from = reinterpret_cast<const uint4*>(&team.rows[t][16 * vec]);
  const auto read = [&] { return vector_of_pairs(from[0], from[1]); };
  const Vector16 vector = read();
  float global = 1.0f;
  if (args.out.global_mode == GlobalMode::kGiven) global = args.out.global[0];
  if (args.out.global_mode == GlobalMode::kPerRow) global = args.out.global[row];
  if (args.out.global_mode == GlobalMode::kComputeRow) {
    float amax = 0;
#pragma unroll
    for (int r = 0; r < kMaxCluster; ++r) amax = fmaxf(amax, team.cluster_amax[r][t]);
    global = nvfp4_global_scale(amax).value;
    if (valid && vec == 0 && place.rank == 0) args.out.row_global[row] = global;
  }
  const uint32_t at = place.rank * kVecs + vec;
  const int64_t v = int64_t{row} * shape.vecs_per_row + at;
  if (args.out.format == RowFormat::kNvfp4)
    write_vector<RowFormat::kNvfp4>(args.out, shape, v, row, at, valid, vector, global, nvfp4_rcp6({global}),
                                    nvfp4_global_is_plain(global), read);
  else
    write_vector<RowFormat::kFp8>(args.out, shape, v, row, at, valid, vector, global, 1.0f, true, read);
}

// The tiles of this team: first, first + step, ... below end. first and step number the teams of the launch, too.
struct Tiles {
  int first, step, end;
  __device__ __forceinline__ bool has(int i) const { return first + i * step < end; }
  __device__ __forceinline__ int token(int i) const { return (first + i * step) * kTileTokens; }
};

// Norm and output of a tile whose squares are on their way.
template <class T>
__device__ __forceinline__ void finish_rows(const HcBoundaryArgs& args, const QuantizeShape& shape,
                                            const DivisionByHidden& division, const Place& place, int64_t first_token,
                                            uint32_t phase, uint32_t parity, const typename T::SharedStorage& shared,
                                            typename T::Team& team) {
  ptx::mbarrier_wait(&team.squares_barrier[parity], phase);
  uint32_t y[4];
  load_pairs(&team.collapsed[place.thread], y);
  if (args.norm_weight) {
    uint32_t norm_weight[4];
    load_pairs(&shared.norm_weight[place.thread], norm_weight);
    const auto& squares = team.cluster_squares[parity];
    const int r = place.quarter * 4, t = place.token;
    double sum = (squares[r][t] + squares[r + 1][t]) + (squares[r + 2][t] + squares[r + 3][t]);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float factor = __frcp_rn(__fsqrt_rn(division(static_cast<float>(sum)) + args.rms_eps));
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      y[pair] = ptx::cvt_bf16x2(ptx::low_bf16(norm_weight[pair]) * (ptx::low_bf16(y[pair]) * factor),
                                ptx::high_bf16(norm_weight[pair]) * (ptx::high_bf16(y[pair]) * factor));
  }
  if (args.out.global_mode == GlobalMode::kComputeRow) {
    send_amax<T>(place, y, team);
    ptx::mbarrier_wait(&team.amax_barrier, parity);
  }
  if (args.out.format == RowFormat::kBf16) {
    const int64_t token = first_token + place.token;
    if (token < args.num_tokens)
      store_pairs(args.out.y + token * args.hidden + place.rank * T::kChannels + place.channel, y);
  } else {
    write_quantized<T>(args, shape, place, first_token, y, team);
  }
}

// What the predecessor of the kernel wrote may be read from here on.
template <class T>
__device__ __forceinline__ void issue_first_tile(const HcBoundaryArgs& args, const Place& place, const Tiles& tiles,
                                                 typename T::Team& team) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  issue_loads<T>(args, place, tiles.token(0), team.coefficients[0], team);
}

// Three steps a tile; the last one of a tile comes after the first of the next, so that neither exchange is waited for idly:
// spread and mix (i); finish (i - 1); collapse (i).
template <class T>
__device__ __forceinline__ void run_compute_warps(const HcBoundaryArgs& args, const QuantizeShape& shape,
                                                  const DivisionByHidden& division, const Place& place,
                                                  const Tiles& tiles, bool dependent,
                                                  typename T::SharedStorage& shared) {
  auto& team = shared.teams[place.team];
  const float scale = T::kCollapses ? args.scale[0] : 0, base = T::kCollapses ? args.base[place.quarter] : 0;
  Weights<T> weights;
  if (!T::kStaged || dependent) take_weights<T, true>(args, place, weights, shared);
  if (!T::kStaged && args.norm_weight)
    shared.norm_weight[place.thread] =
        *reinterpret_cast<const uint4*>(args.norm_weight + place.rank * T::kChannels + place.channel);
  if (dependent) issue_first_tile<T>(args, place, tiles, team);
  if (T::kStaged && !dependent)
    ptx::async_copy_wait<kStreams>();  // the weights are still on their way
  else
    ptx::async_copy_wait<0>();
  if constexpr (T::kTeams > 1)
    ptx::named_barrier_sync(kCtaBarrier, T::kComputeThreads);  // the weights are from all teams
  else
    team_sync<T>(place);
  ptx::cluster_wait();  // every CTA runs and has its barriers
  uint32_t owner = 0;   // of tile i: i modulo the cluster's size
#pragma unroll 1
  for (int i = 0; i == 0 || tiles.has(i - 1); ++i, owner = owner + 1 == place.cluster ? 0 : owner + 1) {
    const auto parity = static_cast<uint32_t>(i & 1), phase = static_cast<uint32_t>(i >> 1 & 1);
    const bool has_tile = tiles.has(i);
    uint32_t x[kStreams][4];
    if (has_tile) {
      if (place.thread == 0) {
        if (T::kCollapses) {
          ptx::mbarrier_arrive_expect_tx(&team.mix_barrier[parity], place.cluster * sizeof(team.cluster_sums[0][0]));
          ptx::mbarrier_arrive_expect_tx(&team.squares_barrier[parity],
                                         place.cluster * sizeof(team.cluster_squares[0][0]));
        }
        if (T::kOwnerSums > 0 && owner == place.rank) {
          ptx::mbarrier_arrive_expect_tx(&team.owner_barrier, place.cluster * T::kOwnerSums * sizeof(float));
          if (!T::kCollapses)
            ptx::mbarrier_arrive_expect_tx(&team.mix_barrier[parity], place.cluster * kTileTokens * sizeof(float));
        }
      }
      spread<T>(args, place, team.coefficients[parity], team, x);
      if (T::kStaged && i == 0 && !dependent) take_weights<T, false>(args, place, weights, shared);
      mix<T>(place, weights, x, shared, team);
      team_sync<T>(place);
      send_mix<T>(place, owner, parity, team);
      if constexpr (!T::kCollapses) return;  // one tile a cluster
      // While the sums travel.
      store_streams<T>(args, place, tiles.token(i) + place.token, x);
      if (tiles.has(i + 1)) issue_loads<T>(args, place, tiles.token(i + 1), team.coefficients[parity ^ 1], team);
    }
    if (i > 0)
      finish_rows<T>(args, shape, division, place, tiles.token(i - 1), static_cast<uint32_t>((i - 1) >> 1 & 1),
                     parity ^ 1, shared, team);
    if (has_tile) {
      ptx::mbarrier_wait(&team.mix_barrier[parity], phase);
      const auto& sums = team.cluster_sums[parity];
      const float rms = rms_factor<1>(sums, static_cast<uint32_t>(place.quarter), place.token, division, args.rms_eps);
      float pre[kStreams];
      collapse_weights(sums, place, rms, scale, base, args.hc_eps, pre);
      uint32_t y[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float even = pre[0] * ptx::low_bf16(x[0][pair]), odd = pre[0] * ptx::high_bf16(x[0][pair]);
#pragma unroll
        for (int j = 1; j < kStreams; ++j) {
          even = __fmaf_rn(pre[j], ptx::low_bf16(x[j][pair]), even);
          odd = __fmaf_rn(pre[j], ptx::high_bf16(x[j][pair]), odd);
        }
        y[pair] = ptx::cvt_bf16x2(even, odd);
      }
      team.collapsed[place.thread] = {y[0], y[1], y[2], y[3]};
      send_squares<T>(place, y, owner == place.rank, parity, team);
    }
  }
  const auto cta = static_cast<uint32_t>(tiles.first) * place.cluster + place.rank,
             ctas = static_cast<uint32_t>(tiles.step) * place.cluster;
  zero_sf_padding(args.out, shape, cta * T::kTeamThreads + place.thread, ctas * T::kTeamThreads);
}

// The last warp: lane 8 j + t has row j of comb, and post j, of token t.
template <class T>
__device__ __forceinline__ void run_last_warp(const HcBoundaryArgs& args, const DivisionByHidden& division,
                                              const Place& place, const Tiles& tiles, typename T::Team& team) {
  const int t = static_cast<int>(place.lane % 8), j = static_cast<int>(place.lane / 8);
  float4 base = {};
  float post_base = 0, post_scale = 0, comb_scale = 0;
  if constexpr (T::kHasComb) base = *reinterpret_cast<const float4*>(args.base + 8 + 4 * j), comb_scale = args.scale[2];
  if constexpr (T::kHasPost) post_base = args.base[4 + j], post_scale = args.scale[1];
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  ptx::cluster_wait();
  if constexpr (T::kOwnerSums > 0) {
    uint32_t parity = 0;
#pragma unroll 1
    for (int i = static_cast<int>(place.rank); tiles.has(i); i += static_cast<int>(place.cluster), parity ^= 1) {
      ptx::mbarrier_wait(&team.owner_barrier, parity);
      // Its earlier phases are over, because this CTA has sent this tile's sums.
      ptx::mbarrier_wait(&team.mix_barrier[i & 1], static_cast<uint32_t>(i >> 1 & 1));
      const float rms = rms_factor<8>(team.cluster_sums[i & 1], static_cast<uint32_t>(j), t, division, args.rms_eps);
      float sums[1 + kStreams] = {};
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r)
#pragma unroll
        for (int v = T::kHasPost ? 0 : 1; v < (T::kHasComb ? 1 + kStreams : 1); ++v)
          sums[v] += team.cluster_post_comb[r][32 * v + place.lane];
      const float post = 2.0f * sigmoid(sums[0] * rms * post_scale + post_base);
      const float logits[4] = {sums[1] * rms * comb_scale + base.x, sums[2] * rms * comb_scale + base.y,
                               sums[3] * rms * comb_scale + base.z, sums[4] * rms * comb_scale + base.w};
      if constexpr (T::kCollapses)  // mix sums have been read
        ptx::named_barrier_arrive(kAllBarrier + 2 * place.team, T::kTeamThreads + 32);
      float4 comb;
      if constexpr (T::kHasComb) comb = sinkhorn(logits, args.sinkhorn_iters, args.hc_eps);
      if (const int64_t token = tiles.token(i) + t; token < args.num_tokens) {
        if constexpr (T::kHasPost) args.post_out[token * kStreams + j] = post;
        if constexpr (T::kHasComb) *reinterpret_cast<float4*>(args.comb_out + token * 16 + 4 * j) = comb;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void zero_absent_ranks(uint32_t cluster, typename T::Team& team) {
#pragma unroll 1
  for (uint32_t r = cluster; r < kMaxCluster; ++r)
    if (const uint32_t i = threadIdx.x; i < kPostCombSums) {  // no more threads than that are needed
      if (i < kPreSums + kTileTokens) team.cluster_sums[0][r][i] = team.cluster_sums[1][r][i] = 0;
      if (T::kOwnerSums > 0) team.cluster_post_comb[r][i] = 0;
      if (i < kTileTokens)
        team.cluster_squares[0][r][i] = team.cluster_squares[1][r][i] = 0, team.cluster_amax[r][i] = 0;
    }
}

// cluster, clusters: among those that compute the same.
template <class T>
__device__ __forceinline__ void run_part(const HcBoundaryArgs& args, const QuantizeShape& shape,
                                         const DivisionByHidden& division, int num_tiles, bool dependent,
                                         uint32_t cluster, uint32_t clusters) {
  static_assert(sizeof(typename T::SharedStorage) <= 227 * 1024);
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(ptx::dynamic_smem());
  Place place;
  const uint32_t warp = threadIdx.x / 32;
  const bool computes = warp < T::kTeams * T::kWarps;
  place.rank = ptx::cluster_cta_rank(), place.cluster = ptx::cluster_size(), place.lane = threadIdx.x % 32;
  place.team = T::kTeams == 1 ? 0 : computes ? warp / T::kWarps : warp - T::kTeams * T::kWarps;
  place.warp = warp % T::kWarps, place.thread = threadIdx.x % T::kTeamThreads;
  place.token = static_cast<int>(place.lane / 4), place.quarter = static_cast<int>(place.lane % 4);
  place.channel = static_cast<int>(32 * place.warp) + 8 * place.quarter;
  const Tiles tiles{static_cast<int>(cluster + place.team * clusters), static_cast<int>(clusters * T::kTeams),
                    num_tiles};
  if (threadIdx.x < T::kTeams) {  // before the copies: the fence would wait for them
    auto& team = shared.teams[threadIdx.x];
    for (uint64_t* barrier : {&team.mix_barrier[0], &team.mix_barrier[1], &team.squares_barrier[0],
                              &team.squares_barrier[1], &team.amax_barrier, &team.owner_barrier})
      ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  // With a kernel before it still running, the weights come first; else the input does.
  if (computes && !dependent) issue_first_tile<T>(args, place, tiles, shared.teams[place.team]);
  if constexpr (T::kStaged)
    if (computes) issue_weights<T>(args, place, shared);
  for (auto& team : shared.teams) zero_absent_ranks<T>(place.cluster, team);
  __syncthreads();
  ptx::cluster_arrive_relaxed();
  if (computes)
    run_compute_warps<T>(args, shape, division, place, tiles, dependent, shared);
  else
    run_last_warp<T>(args, division, place, tiles, shared.teams[place.team]);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    boundary_kernel(const HcBoundaryArgs args, const QuantizeShape shape, const DivisionByHidden division,
                    const int num_tiles, const bool dependent) {
  run_part<T>(args, shape, division, num_tiles, dependent, ptx::cluster_id(), ptx::num_clusters());
}

// Two clusters a tile, each with its rows of fn.
template <class Comb, class Rest>
__global__ void __launch_bounds__(Rest::kThreads, 1)
    shared_boundary_kernel(const HcBoundaryArgs args, const QuantizeShape shape, const DivisionByHidden division,
                           const int num_tiles, const bool dependent) {
  const uint32_t id = ptx::cluster_id(), clusters = ptx::num_clusters() / 2;
  if (id % 2 == 0)
    run_part<Comb>(args, shape, division, num_tiles, dependent, id / 2, clusters);
  else
    run_part<Rest>(args, shape, division, num_tiles, dependent, id / 2, clusters);
}

// clusters(most): how many to launch, of most that the device holds at once. 0: none, and false is returned.
template <auto kKernel, class Clusters>
bool launch_clusters(const HcBoundaryArgs& args, const QuantizeShape& shape, const GpuContext& context, int channels,
                     int threads, size_t smem_bytes, const Clusters& clusters) {
  static gpu::ClusterCapacity capacity[kMaxCluster + 1];
  const auto cluster = static_cast<int>(args.hidden / channels);
  gpu::LaunchConfig config{.block = static_cast<uint32_t>(threads),
                           .smem_bytes = static_cast<int>(smem_bytes),
                           .stream = context.stream,
                           .cluster = cluster,
                           .dependent = context.dependent};
  const int64_t count = clusters(capacity[cluster].of(kKernel, config));
  if (count == 0) return false;
  config.grid = static_cast<uint32_t>(count * cluster);
  gpu::launch(kKernel, config, args, shape,
              DivisionByHidden{static_cast<float>(args.hidden), 1.0f / static_cast<float>(args.hidden)},
              static_cast<int>((args.num_tokens + kTileTokens - 1) / kTileTokens), context.dependent);
  return true;
}

template <class T>
void run(const HcBoundaryArgs& args, const QuantizeShape& shape, const GpuContext& context) {
  const bool launched = launch_clusters<boundary_kernel<T>>(
      args, shape, context, T::kChannels, T::kThreads, sizeof(typename T::SharedStorage),
      [&](int64_t most) { return std::min((args.num_tokens + kTileTokens - 1) / kTileTokens, most); });
  DSV4_GPU_REQUIRE("hyper_connection_boundary", launched,
                   "hidden = %lld: this GPU has no room for a cluster of %d CTAs", static_cast<long long>(args.hidden),
                   static_cast<int>(args.hidden / T::kChannels));
}

// False: there is no room for all tiles at once.
bool run_shared(const HcBoundaryArgs& args, const QuantizeShape& shape, const GpuContext& context) {
  using Comb = Traits<Part::kComb, 8, 1>;
  using Rest = Traits<Part::kRest, 8, 1>;
  return launch_clusters<shared_boundary_kernel<Comb, Rest>>(
      args, shape, context, Rest::kChannels, Rest::kThreads,
      std::max(sizeof(typename Comb::SharedStorage), sizeof(typename Rest::SharedStorage)), [&](int64_t most) {
        const int64_t needed = 2 * ((args.num_tokens + kTileTokens - 1) / kTileTokens);
        return needed <= most ? needed : 0;
      });
}

struct Memory {
  const void* begin;
  int64_t bytes;
};
bool apart(const Memory& a, const Memory& b) {
  return !a.begin || !b.begin || static_cast<const char*>(a.begin) + a.bytes <= b.begin ||
         static_cast<const char*>(b.begin) + b.bytes <= a.begin;
}
// One cluster may not write what another one of the same call reads.
bool may_share_tiles(const HcBoundaryArgs& args) {
  const int64_t t = args.num_tokens, row_bytes = t * args.hidden * 2;  // bf16; codes are fewer
  const Memory inputs[] = {{args.streams, row_bytes * kStreams},
                           {args.sublayer_out, row_bytes},
                           {args.post, t * kStreams * 4},
                           {args.comb, t * kStreams * kStreams * 4}};
  const Memory outputs[] = {{args.sublayer_out ? args.streams_out : nullptr, row_bytes * kStreams},
                            {args.post_out, t * kStreams * 4},
                            {args.comb_out, t * kStreams * kStreams * 4},
                            {args.out.y, row_bytes},
                            {args.out.codes, row_bytes},
                            {args.out.sf, quantized_sf_bytes(args.out, t, args.hidden)},
                            {args.out.row_global, t * 4}};
  for (const Memory& in : inputs)
    for (const Memory& out : outputs)
      if (!apart(in, out)) return false;
  return true;
}

}  // namespace

void hyper_connection_boundary(const HcBoundaryArgs& args, const GpuContext& context) {
  constexpr const char* kOp = "hyper_connection_boundary";
  const bool narrow = args.hidden % 256 == 0 && args.hidden / 256 <= kMaxCluster;
  DSV4_GPU_REQUIRE(kOp, args.hidden >= 512 && (narrow || (args.hidden % 512 == 0 && args.hidden / 512 <= kMaxCluster)),
                   "hidden = %lld", static_cast<long long>(args.hidden));
  DSV4_GPU_REQUIRE(kOp, args.num_tokens >= 0 && args.num_tokens * (args.hidden / 16) < (int64_t{1} << 31),
                   "num_tokens = %lld", static_cast<long long>(args.num_tokens));
  DSV4_GPU_REQUIRE(kOp, args.out.format == RowFormat::kBf16 ? args.out.y != nullptr : args.out.codes && args.out.sf,
                   "an output pointer is null");
  DSV4_GPU_REQUIRE(kOp, !args.sublayer_out || (args.post && args.comb && args.streams_out),
                   "post, comb or streams_out is null");
  DSV4_GPU_REQUIRE(kOp, args.sinkhorn_iters >= 1, "sinkhorn_iters = %d", args.sinkhorn_iters);
  if (args.num_tokens == 0) return;
  const QuantizeShape shape = make_quantize_shape(args.out, args.num_tokens, args.hidden);
  if (args.head) {
    narrow ? run<Traits<Part::kHead, 8, 1>>(args, shape, context)
           : run<Traits<Part::kHead, 16, 1>>(args, shape, context);
  } else if (!narrow) {
    // A row's fp8 scales are of 128 channels, which must be of one CTA.
    args.hidden % 448 == 0 && args.out.format != RowFormat::kFp8 ? run<Traits<Part::kAll, 14, 1>>(args, shape, context)
                                                                 : run<Traits<Part::kAll, 16, 1>>(args, shape, context);
  } else if (args.num_tokens > kFewTokens) {
    run<Traits<Part::kAll, 8, 2>>(args, shape, context);
  } else if (!may_share_tiles(args) || !run_shared(args, shape, context)) {
    run<Traits<Part::kAll, 8, 1>>(args, shape, context);
  }
}

}  // namespace dsv4
