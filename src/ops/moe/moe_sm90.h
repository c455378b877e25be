// What the Hopper MoE kernels take, and their launchers. moe_gpu.cpp chooses by MoePlan and lays out the workspace.
// Oracle of these kernels and of the CPU's moe: tests/gpu/moe_reference.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codec/bf16.h"
#include "gpu/l2_sides.h"

namespace dsv4::sm90 {

// Which side of the L2 SMs and weights are on (moe_layout.h). Null pointers: not known; then the packed weights lie as for words of 0.
struct MoeSides {
  const uint16_t* fc1 = nullptr;  // [num_experts, moe_fc1_slab_pairs]
  const uint16_t* fc2 = nullptr;  // [num_experts, moe_fc2_slab_pairs]
  gpu::SmSides sms;
};

// Weights of all experts in kernel form (moe_layout.h), packed with these sides.
struct MoeExperts {
  const uint8_t* fc1;  // [num_experts] of moe_fc1_bytes  both aligned to kMoeChunkPairBytes
  const uint8_t* fc2;  // [num_experts] of moe_fc2_bytes
  const float* alpha;  // [num_experts, 3]  global scale of w1, w3, w2
  MoeSides sides;
};

// The shared expert in kernel form (moe_shared_sm90.h), FP8, in device memory. fc1 == nullptr: none.
struct MoeSharedWeights {
  const uint8_t* fc1 = nullptr;  // moe_shared_fc1_bytes
  const uint8_t* fc2 = nullptr;  // moe_shared_fc2_bytes
  const float* alpha = nullptr;  // [3] of w1, w3, w2
  int inter = 0;                 // multiple of 64
};

struct MoeShape {
  int hidden;  // multiples of 64
  int inter;
  int num_experts;  // at most kMoeMaxExperts
  int num_topk;     // at most 32
};
constexpr int kMoeMaxExperts = 1024;

// ---- ring and streaming tier: everything in one launch, few rows per expert ----

constexpr int kRingMaxSlots = 1024;  // num_tokens * num_topk
constexpr int kStreamMaxSlots = 2048;
constexpr int kStreamMaxColumns = 32768;  // hidden or inter of a routed expert, streaming tier
// Chunks, rows of one expert in one task: at most one a slot and those of the shared expert.
constexpr int kStreamMaxChunks = kStreamMaxSlots + kRingMaxSlots / 8;

// Counters in the workspace: zero before the first launch, zero again after every launch.
struct MoeStreamArgs {
  MoeExperts experts;
  MoeShape shape;
  const bf16* x;              // [num_tokens, hidden]
  const int32_t* topk_idx;    // [num_tokens, num_topk]
  const float* topk_weights;  // [num_tokens, num_topk]
  MoeSharedWeights shared;    // the shared expert as tasks of this launch, or none
  bf16* shared_h;             // [num_tokens, shared.inter]  scratch of those tasks
  bf16*
      shared_y;  // [num_tokens, hidden] added to the sum, or nullptr: with `shared` what its tasks write, else an input
  bf16* y;       // [num_tokens, hidden]
  bf16* h;       // [num_tokens * num_topk, inter]   scratch
  bf16* slot_y;  // [num_tokens * num_topk, hidden]  scratch
  uint32_t* fc1_done;  // [kStreamMaxChunks]   tasks of fc1 finished, per chunk, the shared expert's first
  uint32_t* fc2_done;  // [fc2 strips]         ring: chunks finished, per strip; streaming: [0], tasks of fc2 finished
  uint32_t* exited;    // [1]
  uint32_t* drawn;     // [1]                  ring: first tasks drawn, those of side 1 << 16
  uint32_t* ticket;    // [2, 2]               streaming: of fc1 and fc2, per side
  int num_tokens;
  float swiglu_limit;
};
// ctas: the ring tier needs them all co-resident, the streaming tier does not.
void launch_moe_ring(const MoeStreamArgs& args, int ctas, cudaStream_t stream);
void launch_moe_stream(const MoeStreamArgs& args, int ctas, cudaStream_t stream);

// ---- tiled tier: route, gather, GEMMs, combine, any number of rows per expert ----
//
// Token rows of one expert stand together, padded to a multiple of 8 and cut into tiles of about equal size, at most kTileRows.
// Tiles stand in lists by size, because a small tile wants its shared memory for weights on their way, a large one for token rows.
// A token operand (gathered x, h) is stored tile after tile, in a tile one block of 64 columns after another, in a block row
// after row of 128 bytes in kernel column order (moe_layout.h) with 16-byte chunk c at c ^ (row & 7): what wgmma reads, one bulk
// copy each.

constexpr int kTileRows = 120, kSmallTileRows = 48, kTinyTileRows = 16;

struct MoeTile {
  int expert;
  int first_row;  // padded row index
  int rows;       // in use
  int padded;     // multiple of 8
};

// Rows of every tile of an expert with `rows` rows but the last, which has the rest.
constexpr int moe_tile_step(int rows) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  return tiles == 0 ? 8 : ((rows + tiles - 1) / tiles + 7) / 8 * 8;
}

enum class TileList : int { kLarge, kSmall, kTiny };
constexpr int kTileLists = 3;
constexpr TileList moe_tile_list(int step) {
  return step <= kTinyTileRows ? TileList::kTiny : step <= kSmallTileRows ? TileList::kSmall : TileList::kLarge;
}

// Result of routing, in the workspace. Sizes for `slots` = num_tokens * num_topk.
struct MoeRouting {
  MoeTile* tiles;        // [kTileLists, max_tiles]
  int32_t* num_tiles;    // [kTileLists]
  int32_t* expert_rows;  // [num_experts, 2]  first padded row, rows in use
  int32_t* row_slot;     // [moe_max_rows]    slot of a padded row; rows without one are not written
  int32_t* slot_row;     // [slots]           padded row of a slot, -1 if unused
  uint32_t* ticket;      // [kTileLists, 2, 2]  of fc1 and fc2, per side of the L2; zeroed by routing
  uint32_t* tile_done;   // [kTileLists, max_tiles]  zeroed by routing
  int max_tiles;         // moe_max_tiles
};
constexpr int64_t moe_max_rows(int64_t slots, int num_experts) {
  return slots + 7 * (slots < num_experts ? slots : num_experts);
}
constexpr int64_t moe_max_tiles(int64_t slots, int num_experts) {
  return (slots < num_experts ? slots : num_experts) + slots / kTileRows;
}

struct MoeTiledArgs {
  MoeExperts experts;
  MoeShape shape;
  MoeRouting routing;
  const float* topk_weights;  // [slots]
  const bf16* x_rows;         // token operand, hidden columns
  bf16* h_rows;               // token operand, inter columns
  float* h_wide;              // a4: [max_rows, inter] binary32 instead of h_rows
  const float* x_global;      // a4: [max_rows] global scale of a row of x
  const float* h_global;      // a4: [max_rows] ... of h
  bf16* slot_y;               // [slots, hidden]
  float swiglu_limit;
};
enum class TiledPhase : int { kBoth, kFc1, kFc2 };

// Rows of an expert stand in no particular order: the bits of a row do not depend on its place or its tile.
void launch_moe_route(const MoeShape& shape, const int32_t* topk_idx, int64_t num_tokens, const MoeRouting& routing,
                      cudaStream_t stream);
void launch_moe_gather(const MoeShape& shape, const MoeRouting& routing, const int32_t* topk_idx, const bf16* x,
                       int64_t num_tokens, bf16* x_rows, cudaStream_t stream);
// a4: rows of x quantised by the run-time rule (codec/nvfp4.h), one global per row; stored as e2m1 * sf, exact in BF16.
void launch_moe_gather_nvfp4(const MoeShape& shape, const MoeRouting& routing, const int32_t* topk_idx, const bf16* x,
                             int64_t num_tokens, bf16* x_rows, float* x_global, cudaStream_t stream);
void launch_moe_requantize(const MoeShape& shape, const MoeRouting& routing, const float* h_wide, bf16* h_rows,
                           float* h_global, cudaStream_t stream);
void launch_moe_tiled(const MoeTiledArgs& args, TiledPhase phase, int ctas, cudaStream_t stream);
void launch_moe_combine(const MoeShape& shape, const int32_t* topk_idx, const bf16* slot_y, const bf16* shared_y,
                        int64_t num_tokens, bf16* y, cudaStream_t stream);

}  // namespace dsv4::sm90
