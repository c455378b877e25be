// hyper_connection_boundary: how a cluster divides a tile, and the shared memory of its CTAs.
#pragma once

#include "codec/bf16.h"
#include "gpu/ptx/sync.cuh"

namespace dsv4::hc {

constexpr int kMaxCluster = 16;
constexpr int kStreams = 4;
constexpr int kTileTokens = 8;
// One team of warps a CTA up to here: weights in registers; two above: they hide each other's waits.
constexpr int kFewTokens = 56;
constexpr int kPreSums = kStreams * kTileTokens;                               // of a tile, the squares behind them
constexpr int kPostCombSums = (kStreams + kStreams * kStreams) * kTileTokens;  // post, then comb column by column
constexpr uint32_t kTeamBarrier = 1, kAllBarrier = 2, kCtaBarrier = 5;         // the first two of each team: + 2 * team

// What a cluster computes. kComb and kRest share a tile between two clusters: comb, and all else.
enum class Part { kAll, kHead, kRest, kComb };

template <Part kPart, int kWarps_, int kTeams_>
struct Traits {
  static constexpr int kWarps = kWarps_, kTeams = kTeams_;
  static constexpr bool kHasPost = kPart == Part::kAll || kPart == Part::kRest,
                        kHasComb = kPart == Part::kAll || kPart == Part::kComb, kCollapses = kPart != Part::kComb;
  static constexpr int kFirstSlot = kPart == Part::kComb ? 8 : 0;  // of the product's rows: pre, post, comb
  static constexpr int kMix = (kHasComb ? 24 : kHasPost ? 8 : 4) - kFirstSlot;
  static constexpr int kFirstSum = kHasPost ? 0 : kStreams * kTileTokens;  // of post and comb, as kPostCombSums
  static constexpr int kOwnerSums = ((kHasPost ? 4 : 0) + (kHasComb ? 16 : 0)) * kTileTokens;
  static constexpr int kTeamThreads = 32 * kWarps, kComputeThreads = kTeams * kTeamThreads,
                       kThreads = kComputeThreads + 32 * kTeams;
  static constexpr int kChannels = 32 * kWarps;            // of a CTA
  static constexpr int kGroups = (kMix + 7) / 8;           // eight mix rows each
  static constexpr int kMmaTiles = (2 * kGroups + 1) / 2;  // sixteen rows each: high parts, then low parts
  // Of the weights, what does not fit the registers: the high parts of so many streams, the low parts.
  static constexpr int kHighInSmem = kTeams > 1 ? kStreams : kMix < 24 || kWarps <= 8 ? 0 : kWarps <= 14 ? 2 : 1;
  static constexpr bool kLowInSmem = kTeams > 1 || kWarps > 8;
  // They come through shared memory, asynchronously: a thread's own part would be half sectors, and waited for where it is asked for.
  static constexpr bool kStaged = !kLowInSmem;
  struct Coefficients {  // of a tile; pitches keep the eight tokens' pieces in different banks
    alignas(16) float post[kTileTokens][4];
    alignas(16) float comb[kTileTokens][20];
  };
  struct Team {
    // [2]: of even and of odd tiles.
    alignas(8) uint64_t mix_barrier[2], squares_barrier[2], amax_barrier, owner_barrier;
    uint4 collapsed[kTeamThreads];  // each thread's own: registers are short
    // Of the next tile: each thread's own channels of the streams, and of the sub-layer output.
    uint4 input[kStreams + 1][kTeamThreads];
    Coefficients coefficients[2];
    float warp_sums[kWarps][kMix + 1][kTileTokens];
    // From every CTA; rows of absent CTAs are zero.
    float cluster_sums[2][kMaxCluster][kPreSums + kTileTokens];
    float cluster_post_comb[kOwnerSums ? kMaxCluster : 1][kPostCombSums];
    double cluster_squares[2][kMaxCluster][kTileTokens];
    double warp_squares[kWarps][kTileTokens];
    float warp_amax[kWarps][kTileTokens];
    float cluster_amax[kMaxCluster][kTileTokens];
    alignas(16) bf16 rows[kTileTokens][kChannels];
  };
  struct SharedStorage {
    Team teams[kTeams];
    uint4 norm_weight[kTeamThreads];
    // kStaged: of a warp's 32 channels; rows in the product's order; of odd rows, neighbouring 16-byte pieces are swapped.
    alignas(16) float raw_weights[kStaged ? kWarps : 1][kStreams][kStaged ? kMix : 1][32];
    // As Weights, a lane's eight channels each.
    uint4 high_weights[kHighInSmem ? kHighInSmem * kGroups : 1][kHighInSmem ? kTeamThreads : 1];
    uint4 low_weights[kLowInSmem ? kStreams * kGroups : 1][kLowInSmem ? kTeamThreads : 1];
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

}  // namespace dsv4::hc
