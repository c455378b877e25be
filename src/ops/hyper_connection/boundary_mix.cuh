// hyper_connection_boundary: what a CTA does for itself: loads, post of the site just left, its part of the mix product.
#pragma once

#include "gpu/ptx/convert.cuh"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/mma.cuh"
#include "ops/hyper_connection/boundary_traits.cuh"
#include "ops/hyper_connection/hyper_connection_gpu.h"

namespace dsv4::hc {

// fn as A fragments: [stream][half of the lane's channels][group of eight rows][pair].
template <class T>
struct Weights {
  uint32_t high[T::kHighInSmem < kStreams ? kStreams - T::kHighInSmem : 1][2][T::kGroups][2];
  uint32_t low[T::kLowInSmem ? 1 : kStreams][2][T::kGroups][2];
};
template <class T>
using StreamWeights = uint32_t[2][T::kGroups][2];

// A warp copies its own channels' weights, a group of copies a stream; with the first, a thread its norm weights.
template <class T>
__device__ __forceinline__ void issue_weights(const HcBoundaryArgs& args, const Place& place,
                                              typename T::SharedStorage& shared) {
  static_assert(T::kStaged);
  const int piece = static_cast<int>(place.lane % 8), first_channel = static_cast<int>(place.rank) * T::kChannels;
  const float* from = args.fn + first_channel + 32 * place.warp + 4 * piece;
  if (T::kCollapses && args.norm_weight)
    ptx::async_copy_16(&shared.norm_weight[place.thread], args.norm_weight + first_channel + place.channel);
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
#pragma unroll
    for (int i = 0; i < T::kMix / 4; ++i) {
      const int slot = 4 * i + static_cast<int>(place.lane / 8);
      ptx::async_copy_16(&shared.raw_weights[place.warp][j][slot][4 * (piece ^ (slot & 1))],
                         from + (int64_t{mix_row(T::kFirstSlot + slot)} * kStreams + j) * args.hidden);
    }
    ptx::async_copy_commit();
  }
}

// Splits them. Returns a value that depends on all of them.
template <class T>
__device__ __forceinline__ uint32_t take_stream_weights(const HcBoundaryArgs& args, const Place& place, int j,
                                                        const typename T::SharedStorage& shared, StreamWeights<T>& high,
                                                        StreamWeights<T>& low) {
  float4 raw[T::kGroups][2];  // the halves next to each other: they share their sectors
#pragma unroll
  for (int group = 0; group < T::kGroups; ++group) {
    const int slot = 8 * group + place.token;
    const float* from = args.fn + (int64_t{mix_row(T::kFirstSlot + slot)} * kStreams + j) * args.hidden +
                        place.rank * T::kChannels + place.channel;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw[group][half] = {};
      if (slot >= T::kMix) continue;
      if constexpr (T::kStaged)
        raw[group][half] = *reinterpret_cast<const float4*>(
            &shared.raw_weights[place.warp][j][slot][4 * ((2 * place.quarter + half) ^ (slot & 1))]);
      else
        raw[group][half] = reinterpret_cast<const float4*>(from)[half];
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

// kHere: not later, although nothing needs them yet.
template <class T, bool kHere>
__device__ __forceinline__ void take_weights(const HcBoundaryArgs& args, const Place& place, Weights<T>& weights,
                                             typename T::SharedStorage& shared) {
  const auto to_smem = [&](const StreamWeights<T>& part, uint4* stream) {
#pragma unroll
    for (int group = 0; group < T::kGroups; ++group)
      stream[group * T::kTeamThreads + place.thread] = {part[0][group][0], part[0][group][1], part[1][group][0],
                                                        part[1][group][1]};
  };
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < kStreams / T::kTeams; ++i) {  // the teams share the work
    const int j = i * T::kTeams + static_cast<int>(place.team);
    if constexpr (T::kStaged) {  // the groups of issue_weights are the latest ones
      if (j == 0) ptx::async_copy_wait<3>();
      if (j == 1) ptx::async_copy_wait<2>();
      if (j == 2) ptx::async_copy_wait<1>();
      if (j == 3) ptx::async_copy_wait<0>();
      __syncwarp();
    }
    StreamWeights<T> high_copy, low_copy;
    auto& high = i < T::kHighInSmem ? high_copy : weights.high[i < T::kHighInSmem ? 0 : i - T::kHighInSmem];
    auto& low = T::kLowInSmem ? low_copy : weights.low[T::kLowInSmem ? 0 : i];
    all ^= take_stream_weights<T>(args, place, j, shared, high, low);
    if (i < T::kHighInSmem) to_smem(high, shared.high_weights[j * T::kGroups]);
    if constexpr (T::kLowInSmem) to_smem(low, shared.low_weights[j * T::kGroups]);
  }
  if constexpr (kHere) ptx::need_here(all);
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
  const auto from_smem = [&](const uint4* stream, StreamWeights<T>& part) {
#pragma unroll
    for (int group = 0; group < G; ++group) {
      const uint4 v = stream[group * T::kTeamThreads + place.thread];
      part[0][group][0] = v.x, part[0][group][1] = v.y, part[1][group][0] = v.z, part[1][group][1] = v.w;
    }
  };
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    StreamWeights<T> high_copy, low_copy;
    if (j < T::kHighInSmem) from_smem(shared.high_weights[j * G], high_copy);
    if constexpr (T::kLowInSmem) from_smem(shared.low_weights[j * G], low_copy);
    const auto& high = j < T::kHighInSmem ? high_copy : weights.high[j < T::kHighInSmem ? 0 : j - T::kHighInSmem];
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

}  // namespace dsv4::hc
