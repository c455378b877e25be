// What the roles of the tiled tier share: tasks, and how a CTA's shared memory (up to 227 KB) is divided. moe_tiled_sm90.cuh has the roles.
#pragma once

#include "gpu/ptx/sync.cuh"
#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4::sm90 {

struct TiledTask {
  int tile, first_strip;  // tile < 0: no more tasks
  int is_fc2;
  int expert, first_row, rows, padded;
  int slot;  // its place in the ring of tasks, and the phase of its barriers: math warps have no registers for them
  uint32_t phase;
};

constexpr int kMathWarpgroups = 4;
constexpr int kMathRegisters = 104, kLoaderRegisters = 64;  // 96 at launch, moved by setmaxnreg
constexpr int kMathWarps = 4 * kMathWarpgroups;
constexpr int kLoaders = 2;  // warps that copy weights; one copies rows, one keeps what belongs to a task
constexpr int kTiledThreads = 32 * (kMathWarps + kLoaders + 2);
constexpr int kMaxSmem = 227 * 1024;

// At the start of shared memory: barriers and tasks of each list. Nothing of it serves two lists, so all barriers are initialised once, before
// the roles part.
constexpr int kMaxStages = 8, kTaskRing = 3;
template <int kMaxRows>
struct TiledControl {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t peer_empty[kMaxStages];  // the same stage of the peer, before this CTA copies token rows to both
  uint64_t task_full[kTaskRing], task_empty[kTaskRing], meta_full[kTaskRing], task_done[kTaskRing];
  TiledTask task[kTaskRing];
  uint64_t ticket_full[kTaskRing];  // tickets from the CTA that draws for the pair
  int32_t ticket[kTaskRing];
  int32_t slot[kTaskRing][kMaxRows];  // of the task's rows, and their routing weights
  alignas(8) float rho[kTaskRing][kMaxRows];
  float alpha[kTaskRing][3];
};
struct TiledShared {
  TiledControl<kTileRows> large;
  TiledControl<kSmallTileRows> small;
  TiledControl<kTinyTileRows> tiny;
};
constexpr int kHeaderBytes = 6144;
static_assert(sizeof(TiledShared) <= kHeaderBytes);

// Behind it each list divides what is left into stages: token rows of all, then weights of all.
template <TileList kList_>
struct TiledTraits {
  static constexpr TileList kList = kList_;
  static constexpr int kMaxRows = kList == TileList::kLarge   ? kTileRows
                                  : kList == TileList::kSmall ? kSmallTileRows
                                                              : kTinyTileRows;
  static constexpr bool kPaired = kList == TileList::kLarge;              // two CTAs share token rows (TiledPair)
  static constexpr int kStageBlocks = kList == TileList::kTiny ? 4 : 2;   // K256, K128
  static constexpr int kGroupStrips = kList == TileList::kSmall ? 2 : 1;  // of a warpgroup
  static constexpr int kStrips = kMathWarpgroups * kGroupStrips;          // of a task
  static constexpr int kGroups = kStrips / kMoeGroupStrips;  // of strips (moe_layout.h): one, or two neighbours
  static constexpr int kStripCodeBytes = kStageBlocks * kMoeBlockCodeBytes;
  static constexpr int kCodeBytes =
      kStrips * kStripCodeBytes;  // strip after strip; behind them scales as in a slab (moe_layout.h)
  static constexpr int kWeightBytes = kStrips * kStageBlocks * kMoeBlockBytes;
  static constexpr int kBlockPitch = kMaxRows * 128;  // from the rows of one block to those of the next
  static constexpr int kRowBytes = kStageBlocks * kBlockPitch;
  static constexpr int kStages = (kMaxSmem - kHeaderBytes) / (kWeightBytes + kRowBytes);
  static constexpr int kWeightsAt = kHeaderBytes + kStages * kRowBytes;
  static constexpr int kSmemBytes = kWeightsAt + kStages * kWeightBytes;
  static_assert(kStages <= kMaxStages && kRowBytes % 1024 == 0 && kSmemBytes <= kMaxSmem);
};

// A value every lane has: into a uniform register, where wgmma wants its descriptors (a third of the ALU work was theirs).
template <class V>
__device__ __forceinline__ V uniform(V v) {
  return __shfl_sync(0xffffffffu, v, 0);
}

// The launch's clusters: two CTAs, or one where only one runs. In a list of pairs (T::kPaired) they work on the same token rows at a time,
// each with weight rows of its own; each brings half of the token rows to both, so that these pass through L2 once.
struct TiledPair {
  int rank, ctas;
  __device__ __forceinline__ int peer() const { return rank ^ 1; }
};
template <class T>
__device__ __forceinline__ TiledPair tiled_pair() {
  if constexpr (!T::kPaired) return {0, 1};
  return {static_cast<int>(ptx::cluster_cta_rank()), static_cast<int>(ptx::cluster_size())};
}

template <class T>
__device__ __forceinline__ auto& tiled_control(TiledShared& shared) {
  if constexpr (T::kList == TileList::kLarge)
    return shared.large;
  else if constexpr (T::kList == TileList::kSmall)
    return shared.small;
  else
    return shared.tiny;
}
template <class T>
__device__ __forceinline__ uint8_t* tiled_rows(TiledShared& shared, int stage) {
  return reinterpret_cast<uint8_t*>(&shared) + kHeaderBytes + stage * T::kRowBytes;
}
template <class T>
__device__ __forceinline__ uint8_t* tiled_weights(TiledShared& shared, int stage) {
  return reinterpret_cast<uint8_t*>(&shared) + T::kWeightsAt + stage * T::kWeightBytes;
}

struct TiledWork {  // what all roles derive from a task
  int blocks, strips, first_strip, num_strips;
};
template <class T>
__device__ __forceinline__ TiledWork tiled_work(const MoeTiledArgs& args, const TiledTask& task) {
  TiledWork work;
  work.blocks = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  work.strips = static_cast<int>(task.is_fc2 ? moe_fc2_strips(args.shape.hidden) : moe_fc1_strips(args.shape.inter));
  work.first_strip = task.first_strip;
  work.num_strips = max(0, min(T::kStrips, work.strips - work.first_strip));  // none: the peer has the last ones
  return work;
}

// Strips of fc1 that are finished for the task's tile.
template <class T>
__device__ __forceinline__ uint32_t& tiled_done(const MoeTiledArgs& args, const TiledTask& task) {
  return args.routing.tile_done[static_cast<int>(T::kList) * args.routing.max_tiles + task.tile];
}

}  // namespace dsv4::sm90
