// hyper_connection_boundary: a cluster holds the mix matrix, 256 (or 512) channels of all four streams a CTA, and takes one tile of eight
// tokens after the other. The mix is a matrix product on the tensor cores (rows: mix, columns: tokens); streams are bf16, so that only the
// weights need splitting: each enters as the sum of two bf16, which keeps 2^-18 of it.
//
// Lane 4 n + q of a compute warp owns token n of the tile and eight channels, in every step: the bf16 pairs of the new streams are the
// product's B fragments as they are, and stay in registers until the row is collapsed. Two all-to-all exchanges a tile (three with a computed
// row global) go through distributed shared memory: asynchronous stores into the other CTAs that count on an mbarrier there (a cluster barrier
// would also wait for the streams written to memory). A team is eight (or sixteen) compute warps and one more, which writes post and
// comb of the tiles this CTA owns, beside the warps that finish the rows. Few tokens: one team with its weights in registers. Many: two teams
// with tiles of their own and the weights in shared memory, because a team alone waits most of the time.
//
// Why the exchange buffers may be reused: a CTA's steps are spread and mix (i), finish (i - 1), collapse (i), and there are two of each buffer.
// Another CTA sends mix sums (i + 2) after it has squares (i) of this one, sent after mix sums (i) were read; and squares (i + 2) after it has
// mix sums (i + 2), sent after squares (i) were read. Sums for the last warp: it has read them before this CTA's squares of that tile go out.
// No CTA sends what a phase of an mbarrier here counts before that phase is the current one, by the same order.
//
// Waits on these mbarriers have CTA scope. The memory model asks for cluster scope, which on the hardware adds an invalidation of L1 (seen in
// the machine code, and in time: spilled registers live there) and nothing for shared memory.
//
// Over 600 lines because the steps of a tile hand each other registers and exchange buffers, by the order above: apart, none can be read.
#include <atomic>
#include <cmath>

#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/mma.cuh"
#include "gpu/ptx/sync.cuh"
#include "ops/hyper_connection/hyper_connection_gpu.h"
#include "ops/hyper_connection/sinkhorn_device.cuh"
#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxCluster = 16;
constexpr int kStreams = 4;
constexpr int kTileTokens = 8;
constexpr int kFewTokens =
    56;  // one team of warps a CTA up to here: weights in registers; two above: they hide each other's waits
constexpr int kPreSums = kStreams * kTileTokens;                           // of a tile, the squares behind them
constexpr int kRestSums = (kStreams + kStreams * kStreams) * kTileTokens;  // post, then comb column by column
constexpr uint32_t kTeamBarrier = 1, kAllBarrier = 2, kCtaBarrier = 5;     // the first two of each team: + 2 * team

template <int kMix_, int kWarps_, int kTeams_>
struct Traits {
  static constexpr int kMix = kMix_, kWarps = kWarps_, kTeams = kTeams_;
  static constexpr bool kHead = kMix == kStreams;
  static constexpr int kTeamThreads = 32 * kWarps, kComputeThreads = kTeams * kTeamThreads,
                       kThreads = kComputeThreads + 32 * kTeams;
  static constexpr int kChannels = 32 * kWarps;            // of a CTA
  static constexpr int kGroups = (kMix + 7) / 8;           // eight mix rows each
  static constexpr int kMmaTiles = (2 * kGroups + 1) / 2;  // sixteen rows each: high parts, then low parts
  static constexpr bool kHighInSmem = kTeams > 1;          // of the weights: where they do not fit the registers
  static constexpr bool kLowInSmem = kHighInSmem || (!kHead && kWarps > 8);
  static constexpr int kPartsInSmem = kHighInSmem ? 2 : kLowInSmem ? 1 : 0;
  struct Coefficients {  // of a tile; pitches keep the eight tokens' pieces in different banks
    alignas(16) float post[kTileTokens][4];
    alignas(16) float comb[kTileTokens][20];
  };
  struct Team {
    alignas(8) uint64_t mix_barrier[2], squares_barrier[2], amax_barrier,
        rest_barrier;               // [2]: of even and of odd tiles
    uint4 collapsed[kTeamThreads];  // each thread's own: registers are short
    uint4 input
        [kStreams + 1]
        [kTeamThreads];  // of the next tile: each thread's own channels of the streams, and of the sub-layer output
    Coefficients coefficients[2];
    float warp_sums[kWarps][kMix + 1][kTileTokens];
    // From every CTA; rows of absent CTAs are zero.
    float cluster_sums[2][kMaxCluster][kPreSums + kTileTokens];
    float cluster_rest[kHead ? 1 : kMaxCluster][kRestSums];
    double cluster_squares[2][kMaxCluster][kTileTokens];
    double warp_squares[kWarps][kTileTokens];
    float warp_amax[kWarps][kTileTokens];
    float cluster_amax[kMaxCluster][kTileTokens];
    alignas(16) bf16 rows[kTileTokens][kChannels];
  };
  struct SharedStorage {
    Team teams[kTeams];
    uint4 norm_weight[kTeamThreads];
    uint4 weights[kStreams * kGroups][kPartsInSmem ? kPartsInSmem : 1]
                 [kPartsInSmem ? kTeamThreads : 1];  // as Weights, a lane's eight channels each
  };
};

// This thread's part in a tile, fixed for the kernel.
struct Place {
  uint32_t rank, cluster;
  uint32_t team, thread, warp, lane;  // thread and warp: in the team
  int token, quarter;                 // of the tile; of the warp's 32 channels
  int channel;                        // the first, in the CTA
};

template <class T>
__device__ __forceinline__ void team_sync(const Place& place) {
  ptx::named_barrier_sync(kTeamBarrier + 2 * place.team, T::kTeamThreads);
}

// The product's row order: post and pre as they come, comb column by column, so that lanes (row of comb, token) read it without bank conflicts.
__device__ __forceinline__ int mix_row(int slot) { return slot < 8 ? slot : 8 + (slot - 8) % 4 * 4 + (slot - 8) / 4; }

// Within 1e-6: the exact operations cost 200 clocks on the way from one exchange to the next.
__device__ __forceinline__ float sigmoid(float x) { return ptx::rcp_approx(1.0f + ptx::exp2_approx(-1.44269504f * x)); }

// fn as A fragments: [stream][half of the lane's channels][group of eight rows][pair].
template <class T>
struct Weights {
  uint32_t high[T::kHighInSmem ? 1 : kStreams][2][T::kGroups][2];
  uint32_t low[T::kLowInSmem ? 1 : kStreams][2][T::kGroups][2];
};
template <class T>
using StreamWeights = uint32_t[2][T::kGroups][2];

// Returns a value that depends on all of them.
template <class T>
__device__ __forceinline__ uint32_t load_stream_weights(const HcBoundaryArgs& args, const Place& place, int j,
                                                        StreamWeights<T>& high, StreamWeights<T>& low) {
  float4 raw[T::kGroups][2];  // the halves next to each other: they share their sectors
#pragma unroll
  for (int group = 0; group < T::kGroups; ++group) {
    const int slot = 8 * group + place.token;
    const float* from =
        args.fn + (int64_t{mix_row(slot)} * kStreams + j) * args.hidden + place.rank * T::kChannels + place.channel;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw[group][half] = {};
      if (slot < T::kMix) raw[group][half] = reinterpret_cast<const float4*>(from)[half];
    }
  }
  uint32_t all = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int group = 0; group < T::kGroups; ++group) {
      const float4 w = raw[group][half];
      const float w4[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t bits = ptx::cvt_bf16x2(w4[2 * pair], w4[2 * pair + 1]);
        high[half][group][pair] = bits;
        low[half][group][pair] =
            ptx::cvt_bf16x2(w4[2 * pair] - ptx::low_bf16(bits), w4[2 * pair + 1] - ptx::high_bf16(bits));
        all ^= bits ^ low[half][group][pair];
      }
    }
  return all;
}

template <class T>
__device__ __forceinline__ void load_weights(const HcBoundaryArgs& args, const Place& place, Weights<T>& weights,
                                             typename T::SharedStorage& shared) {
  const auto to_smem = [&](const StreamWeights<T>& part, int j, int where) {
#pragma unroll
    for (int group = 0; group < T::kGroups; ++group)
      shared.weights[j * T::kGroups + group][where][place.thread] = {part[0][group][0], part[0][group][1],
                                                                     part[1][group][0], part[1][group][1]};
  };
  if constexpr (T::kHighInSmem) {  // the teams share the work
#pragma unroll
    for (int i = 0; i < kStreams / T::kTeams; ++i) {
      const int j = i * T::kTeams + static_cast<int>(place.team);
      StreamWeights<T> high, low;
      load_stream_weights<T>(args, place, j, high, low);
      to_smem(high, j, 0);
      to_smem(low, j, 1);
    }
  } else {
    uint32_t all = 0;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      if constexpr (T::kLowInSmem) {
        StreamWeights<T> low;
        all ^= load_stream_weights<T>(args, place, j, weights.high[j], low);
        to_smem(low, j, 0);
      } else {
        all ^= load_stream_weights<T>(args, place, j, weights.high[j], weights.low[j]);
      }
    }
    ptx::need_here(all);  // before the dependency wait
  }
}

// Copies of what the tile reads: every compute thread its own channels, the first forty the coefficients.
template <class T>
__device__ __forceinline__ void issue_loads(const HcBoundaryArgs& args, const Place& place, int first_token,
                                            typename T::Coefficients& coefficients, typename T::Team& team) {
  if (const int64_t token = first_token + place.token; token < args.num_tokens) {
    const int64_t channel = place.rank * T::kChannels + place.channel;
    const bf16* streams = args.streams + token * kStreams * args.hidden + channel;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) ptx::async_copy_16(&team.input[j][place.thread], streams + j * args.hidden);
    if (args.sublayer_out)
      ptx::async_copy_16(&team.input[kStreams][place.thread], args.sublayer_out + token * args.hidden + channel);
  }
  if (args.sublayer_out && place.thread < 5 * kTileTokens) {
    const int t = static_cast<int>(place.thread / 5), piece = static_cast<int>(place.thread % 5);
    if (first_token + t < args.num_tokens) {
      if (piece < kStreams)
        ptx::async_copy_16(&coefficients.comb[t][4 * piece], args.comb + int64_t{first_token + t} * 16 + 4 * piece);
      else
        ptx::async_copy_16(coefficients.post[t], args.post + int64_t{first_token + t} * kStreams);
    }
  }
  ptx::async_copy_commit();
}

__device__ __forceinline__ void load_pairs(const void* from, uint32_t (&pairs)[4]) {
  const uint4 v = *static_cast<const uint4*>(from);
  pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
}
__device__ __forceinline__ void store_pairs(bf16* to, const uint32_t (&pairs)[4]) {
  *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}
__device__ __forceinline__ void load_floats(const float* from, float (&v)[4]) {
  const float4 f = *reinterpret_cast<const float4*>(from);
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

// x: the tile's new streams, bf16 pairs.
template <class T>
__device__ __forceinline__ void spread(const HcBoundaryArgs& args, const Place& place,
                                       const typename T::Coefficients& coefficients, const typename T::Team& team,
                                       uint32_t (&x)[kStreams][4]) {
#pragma unroll
  for (int j = 0; j < kStreams; ++j) load_pairs(&team.input[j][place.thread], x[j]);
  if (!args.sublayer_out) return;
  uint32_t f[4];
  load_pairs(&team.input[kStreams][place.thread], f);
  float post[kStreams], comb[kStreams][kStreams];
  load_floats(coefficients.post[place.token], post);
#pragma unroll
  for (int j = 0; j < kStreams; ++j) load_floats(&coefficients.comb[place.token][4 * j], comb[j]);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t fresh[kStreams];
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      float even = post[k] * ptx::low_bf16(f[pair]), odd = post[k] * ptx::high_bf16(f[pair]);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        even = __fmaf_rn(comb[j][k], ptx::low_bf16(x[j][pair]), even);
        odd = __fmaf_rn(comb[j][k], ptx::high_bf16(x[j][pair]), odd);
      }
      fresh[k] = ptx::cvt_bf16x2(even, odd);
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) x[k][pair] = fresh[k];
  }
}

template <class T>
__device__ __forceinline__ void store_streams(const HcBoundaryArgs& args, const Place& place, int token,
                                              const uint32_t (&x)[kStreams][4]) {
  if (!args.sublayer_out || token >= args.num_tokens) return;
  bf16* to = args.streams_out + int64_t{token} * kStreams * args.hidden + place.rank * T::kChannels + place.channel;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) store_pairs(to + k * args.hidden, x[k]);
}

// The warp's share of the mix sums and squares, into warp_sums.
template <class T>
__device__ __forceinline__ void mix(const Place& place, const Weights<T>& weights, const uint32_t (&x)[kStreams][4],
                                    const typename T::SharedStorage& shared, typename T::Team& team) {
  constexpr int G = T::kGroups;
  float sums[T::kMmaTiles][4] = {};
  const auto from_smem = [&](int j, int where, StreamWeights<T>& part) {
#pragma unroll
    for (int group = 0; group < G; ++group) {
      const uint4 v = shared.weights[j * G + group][where][place.thread];
      part[0][group][0] = v.x, part[0][group][1] = v.y, part[1][group][0] = v.z, part[1][group][1] = v.w;
    }
  };
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    StreamWeights<T> high_copy, low_copy;
    if constexpr (T::kHighInSmem) from_smem(j, 0, high_copy);
    if constexpr (T::kLowInSmem) from_smem(j, T::kPartsInSmem - 1, low_copy);
    const auto& high = T::kHighInSmem ? high_copy : weights.high[T::kHighInSmem ? 0 : j];
    const auto& low = T::kLowInSmem ? low_copy : weights.low[T::kLowInSmem ? 0 : j];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows of the product: the high parts of all groups, then the low parts.
      const auto part = [&](int group, int pair) {
        return group < G ? high[half][group][pair] : low[half][group - G][pair];
      };
#pragma unroll
      for (int tile = 0; tile < T::kMmaTiles; ++tile)
        ptx::mma_m16n8k16_bf16(sums[tile],
                               {part(2 * tile, 0), part(2 * tile + 1, 0), part(2 * tile, 1), part(2 * tile + 1, 1)},
                               x[j][2 * half], x[j][2 * half + 1]);
    }
  }
  float squares[2] = {};
#pragma unroll
  for (int j = 0; j < kStreams; ++j)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float even = ptx::low_bf16(x[j][pair]), odd = ptx::high_bf16(x[j][pair]);
      squares[0] = __fmaf_rn(even, even, squares[0]);
      squares[1] = __fmaf_rn(odd, odd, squares[1]);
    }
  float square = squares[0] + squares[1];
  square += __shfl_xor_sync(0xffffffffu, square, 1);
  square += __shfl_xor_sync(0xffffffffu, square, 2);
  if (place.quarter == 0) team.warp_sums[place.warp][T::kMix][place.token] = square;
  // A lane's results: rows lane / 4 and lane / 4 + 8 of each tile, tokens 2 quarter and 2 quarter + 1.
  const auto rows = [&](int group, int token) { return sums[group / 2][group % 2 * 2 + token]; };
#pragma unroll
  for (int group = 0; group < G; ++group) {
    const int slot = 8 * group + place.token;
    if (slot < T::kMix)
      *reinterpret_cast<float2*>(&team.warp_sums[place.warp][slot][2 * place.quarter]) = {
          rows(group, 0) + rows(G + group, 0), rows(group, 1) + rows(G + group, 1)};
  }
}

// Sums over the CTA's warps go out: pre and squares to every CTA, the rest to the tile's owner.
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
  if (warp < kHalf) {
    const float pre = total(lane);
#pragma unroll
    for (uint32_t r = warp; r < kMaxCluster; r += kHalf)
      if (r < place.cluster)
        ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_sums[parity][place.rank][lane], r), pre,
                                     ptx::map_to_cta(&team.mix_barrier[parity], r));
  } else if (warp < kHalf + 4) {
    const uint32_t r = (warp - kHalf) * 4 + lane / 8;
    const float square = total(T::kMix * kTileTokens + lane % 8);
    if (r < place.cluster)
      ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_sums[parity][place.rank][kPreSums + lane % 8], r),
                                   square, ptx::map_to_cta(&team.mix_barrier[parity], r));
  }
  if (const uint32_t i = place.thread; !T::kHead && i < kRestSums)
    ptx::store_async_cluster_f32(ptx::map_to_cta(&team.cluster_rest[place.rank][i], owner), total(kPreSums + i),
                                 ptx::map_to_cta(&team.rest_barrier, owner));
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
  if (owner && !T::kHead)
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
  const Vector16 vector = vector_of_pairs(from[0], from[1]);
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
                                    nvfp4_global_is_plain(global));
  else
    write_vector<RowFormat::kFp8>(args.out, shape, v, row, at, valid, vector, global, 1.0f, true);
}

// The tiles of this CTA's cluster: first, first + step, ...
struct Tiles {
  int first, step, count;
  __device__ int token(int i) const { return (first + i * step) * kTileTokens; }
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

// Three steps a tile; the last one of a tile comes after the first of the next, so that neither exchange is waited for idly:
// spread and mix (i); finish (i - 1); collapse (i).
template <class T>
__device__ __forceinline__ void run_compute_warps(const HcBoundaryArgs& args, const QuantizeShape& shape,
                                                  const DivisionByHidden& division, const Place& place,
                                                  const Tiles& tiles, bool dependent,
                                                  typename T::SharedStorage& shared) {
  auto& team = shared.teams[place.team];
  // With a kernel before it still running, the weights come first; else the input does.
  const auto load_first_tile = [&] {
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    issue_loads<T>(args, place, tiles.token(0), team.coefficients[0], team);
  };
  if (!dependent) load_first_tile();
  Weights<T> weights;
  load_weights<T>(args, place, weights, shared);
  if (args.norm_weight)
    shared.norm_weight[place.thread] =
        *reinterpret_cast<const uint4*>(args.norm_weight + place.rank * T::kChannels + place.channel);
  const float scale = args.scale[0], base = args.base[place.quarter];
  if (dependent) load_first_tile();
  ptx::async_copy_wait<0>();
  if constexpr (T::kTeams > 1)
    ptx::named_barrier_sync(kCtaBarrier, T::kComputeThreads);  // the weights are from all teams
  else
    team_sync<T>(place);
  ptx::cluster_wait();  // every CTA runs and has its barriers
#pragma unroll 1
  for (int i = 0; i <= tiles.count; ++i) {
    const auto parity = static_cast<uint32_t>(i & 1), phase = static_cast<uint32_t>(i >> 1 & 1);
    const uint32_t owner = static_cast<uint32_t>(i) % place.cluster;
    uint32_t x[kStreams][4];
    if (i < tiles.count) {
      if (place.thread == 0) {
        ptx::mbarrier_arrive_expect_tx(&team.mix_barrier[parity], place.cluster * sizeof(team.cluster_sums[0][0]));
        ptx::mbarrier_arrive_expect_tx(&team.squares_barrier[parity],
                                       place.cluster * sizeof(team.cluster_squares[0][0]));
        if (!T::kHead && owner == place.rank)
          ptx::mbarrier_arrive_expect_tx(&team.rest_barrier, place.cluster * sizeof(team.cluster_rest[0]));
      }
      spread<T>(args, place, team.coefficients[parity], team, x);
      mix<T>(place, weights, x, shared, team);
      team_sync<T>(place);
      send_mix<T>(place, owner, parity, team);
      // While the sums travel.
      store_streams<T>(args, place, tiles.token(i) + place.token, x);
      if (i + 1 < tiles.count) issue_loads<T>(args, place, tiles.token(i + 1), team.coefficients[parity ^ 1], team);
    }
    if (i > 0)
      finish_rows<T>(args, shape, division, place, tiles.token(i - 1), static_cast<uint32_t>((i - 1) >> 1 & 1),
                     parity ^ 1, shared, team);
    if (i < tiles.count) {
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
  zero_sf_padding(args.out, shape, blockIdx.x * T::kComputeThreads + threadIdx.x, gridDim.x * T::kComputeThreads);
}

// The last warp: lane 8 j + t has row j of comb, and post j, of token t.
template <class T>
__device__ __forceinline__ void run_last_warp(const HcBoundaryArgs& args, const DivisionByHidden& division,
                                              const Place& place, const Tiles& tiles, typename T::Team& team) {
  const int t = static_cast<int>(place.lane % 8), j = static_cast<int>(place.lane / 8);
  float4 base = {};
  float post_base = 0, post_scale = 0, comb_scale = 0;
  if constexpr (!T::kHead) {
    base = *reinterpret_cast<const float4*>(args.base + 8 + 4 * j);
    post_base = args.base[4 + j], post_scale = args.scale[1], comb_scale = args.scale[2];
  }
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  ptx::cluster_wait();
  if constexpr (!T::kHead) {
    uint32_t parity = 0;
#pragma unroll 1
    for (int i = static_cast<int>(place.rank); i < tiles.count; i += static_cast<int>(place.cluster), parity ^= 1) {
      ptx::mbarrier_wait(&team.rest_barrier, parity);
      // Its earlier phases are over, because this CTA has sent this tile's sums.
      ptx::mbarrier_wait(&team.mix_barrier[i & 1], static_cast<uint32_t>(i >> 1 & 1));
      const float rms = rms_factor<8>(team.cluster_sums[i & 1], static_cast<uint32_t>(j), t, division, args.rms_eps);
      float sums[1 + kStreams] = {};
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r)
#pragma unroll
        for (int v = 0; v < 1 + kStreams; ++v) sums[v] += team.cluster_rest[r][32 * v + place.lane];
      const float post = 2.0f * sigmoid(sums[0] * rms * post_scale + post_base);
      const float logits[4] = {sums[1] * rms * comb_scale + base.x, sums[2] * rms * comb_scale + base.y,
                               sums[3] * rms * comb_scale + base.z, sums[4] * rms * comb_scale + base.w};
      ptx::named_barrier_arrive(kAllBarrier + 2 * place.team, T::kTeamThreads + 32);  // mix sums have been read
      const float4 comb = sinkhorn(logits, args.sinkhorn_iters, args.hc_eps);
      const int64_t token = tiles.token(i) + t;
      if (token < args.num_tokens) {
        args.post_out[token * kStreams + j] = post;
        *reinterpret_cast<float4*>(args.comb_out + token * 16 + 4 * j) = comb;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void zero_absent_ranks(uint32_t cluster, typename T::Team& team) {
#pragma unroll 1
  for (uint32_t r = cluster; r < kMaxCluster; ++r)
    if (const uint32_t i = threadIdx.x; i < kRestSums) {  // no more threads than that are needed
      if (i < kPreSums + kTileTokens) team.cluster_sums[0][r][i] = team.cluster_sums[1][r][i] = 0;
      if (!T::kHead) team.cluster_rest[r][i] = 0;
      if (i < kTileTokens)
        team.cluster_squares[0][r][i] = team.cluster_squares[1][r][i] = 0, team.cluster_amax[r][i] = 0;
    }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    boundary_kernel(const HcBoundaryArgs args, const QuantizeShape shape, const DivisionByHidden division,
                    uint32_t cluster, bool dependent) {
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(ptx::dynamic_smem());
  Place place;
  const uint32_t warp = threadIdx.x / 32;
  const bool computes = warp < T::kTeams * T::kWarps;
  place.rank = ptx::cluster_cta_rank(), place.cluster = cluster, place.lane = threadIdx.x % 32;
  place.team = T::kTeams == 1 ? 0 : computes ? warp / T::kWarps : warp - T::kTeams * T::kWarps;
  place.warp = warp % T::kWarps, place.thread = threadIdx.x % T::kTeamThreads;
  place.token = static_cast<int>(place.lane / 4), place.quarter = static_cast<int>(place.lane % 4);
  place.channel = static_cast<int>(32 * place.warp) + 8 * place.quarter;
  if (threadIdx.x < T::kTeams) {
    auto& team = shared.teams[threadIdx.x];
    for (uint64_t* barrier : {&team.mix_barrier[0], &team.mix_barrier[1], &team.squares_barrier[0],
                              &team.squares_barrier[1], &team.amax_barrier, &team.rest_barrier})
      ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  for (auto& team : shared.teams) zero_absent_ranks<T>(cluster, team);
  __syncthreads();
  ptx::cluster_arrive();
  const int num_tiles = static_cast<int>((args.num_tokens + kTileTokens - 1) / kTileTokens),
            clusters = static_cast<int>(gridDim.x / cluster);
  const int first = static_cast<int>(blockIdx.x / cluster) + static_cast<int>(place.team) * clusters,
            step = clusters * T::kTeams;
  const Tiles tiles{first, step, first < num_tiles ? (num_tiles - first + step - 1) / step : 0};
  if (computes)
    run_compute_warps<T>(args, shape, division, place, tiles, dependent, shared);
  else
    run_last_warp<T>(args, division, place, tiles, shared.teams[place.team]);
}

// Clusters of this size that the device can hold at once.
template <class T>
int max_active_clusters(uint32_t cluster) {
  constexpr int kDevices = 16;                               // of a process; attributes and occupancy belong to one
  static std::atomic<int> known[kDevices][kMaxCluster + 1];  // clusters + 1
  int device = 0;
  DSV4_CUDA(cudaGetDevice(&device));
  int clusters = device < kDevices ? known[device][cluster].load() - 1 : -1;
  if (clusters < 0) {
    gpu::allow_smem(boundary_kernel<T>, sizeof(typename T::SharedStorage));
    gpu::allow_large_cluster(boundary_kernel<T>);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = cluster, config.blockDim = T::kThreads,
    config.dynamicSmemBytes = sizeof(typename T::SharedStorage);
    config.attrs = &attribute, config.numAttrs = 1;
    DSV4_CUDA(cudaOccupancyMaxActiveClusters(&clusters, boundary_kernel<T>, &config));
    if (device < kDevices) known[device][cluster] = clusters + 1;
  }
  return clusters;
}

template <class T>
void run(const HcBoundaryArgs& args, const QuantizeShape& shape, const GpuContext& context) {
  const auto cluster = static_cast<uint32_t>(args.hidden / T::kChannels);
  const int64_t tiles = (args.num_tokens + kTileTokens - 1) / kTileTokens, most = max_active_clusters<T>(cluster);
  DSV4_GPU_REQUIRE("hyper_connection_boundary", most > 0,
                   "hidden = %lld: this GPU has no room for a cluster of %u CTAs", static_cast<long long>(args.hidden),
                   cluster);
  const int64_t clusters = tiles < most ? tiles : most;
  gpu::launch(boundary_kernel<T>,
              {.grid = static_cast<uint32_t>(clusters * cluster),
               .block = T::kThreads,
               .smem_bytes = sizeof(typename T::SharedStorage),
               .stream = context.stream,
               .cluster = static_cast<int>(cluster),
               .dependent = context.dependent},
              args, shape, DivisionByHidden{static_cast<float>(args.hidden), 1.0f / static_cast<float>(args.hidden)},
              cluster, context.dependent);
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
  if (args.head)
    narrow ? run<Traits<4, 8, 1>>(args, shape, context) : run<Traits<4, 16, 1>>(args, shape, context);
  else if (!narrow)
    run<Traits<24, 16, 1>>(args, shape, context);
  else if (args.num_tokens > kFewTokens)
    run<Traits<24, 8, 2>>(args, shape, context);
  else
    run<Traits<24, 8, 1>>(args, shape, context);
}

}  // namespace dsv4
