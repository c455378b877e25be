// Tiled tier of the MoE layer on Hopper: fc1 with SwiGLU and fc2 over sorted token rows, one persistent launch.
//
// Task = 256 weight rows (4 strips) x one tile of up to 120 token rows of one expert; tiles stand in three lists by size (moe_sm90.h), worked
// through one after the other, each with its own division of shared memory. Tickets of a list are drawn from a global counter,
// all of fc1 first, then fc2, which waits for the tile_done counter of its rows: tickets are handed out in order, so what a
// CTA waits for is always held by a running CTA. Warps: four math warpgroups with one strip each, a warp that draws tickets
// and copies weights (never waiting for fc1), another for weights, and two that copy token rows. Weights are decoded in registers and used as the
// register operand of wgmma m64nNk16, N = the tile's rows rounded up to 8, or, to 16 rows, of mma.sync; no decoded weight is ever stored.
#pragma once

#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/spin.cuh"
#include "gpu/sm90/wgmma_rs.cuh"
#include "ops/moe/moe_decode_sm90.cuh"
#include "ops/moe/moe_sm90.h"
#include "ops/quantize/swiglu_device.cuh"

namespace dsv4::sm90 {

struct TiledTask {
  int tile, block;  // tile < 0: no more tasks
  int is_fc2;
  int expert, first_row, rows, padded;
};

constexpr int kMathWarpgroups = 4;
constexpr int kMathRegisters = 104, kLoaderRegisters = 64;  // 96 at launch, moved by setmaxnreg
constexpr int kStrips = kMathWarpgroups;                    // one strip each: 256 weight rows a task
constexpr int kLoaders = 2;                                 // warps that copy weights, and as many that copy rows
constexpr int kTiledThreads = 128 * kMathWarpgroups + 64 * kLoaders;
constexpr int kMaxSmem = 227 * 1024;

template <TileList kList_>
struct TiledTraits {
  static constexpr TileList kList = kList_;
  static constexpr int kMaxRows = kList == TileList::kLarge ? kTileRows : kList == TileList::kSmall ? kSmallTileRows : kTinyTileRows;
  static constexpr int kStageBlocks = kList == TileList::kTiny ? 4 : 2;  // K256, K128
  static constexpr int kStripStageBytes = kStageBlocks * kMoeBlockBytes;
  static constexpr int kWeightBytes = kStrips * kStripStageBytes;
  static constexpr int kRowBytes = kMaxRows * 128 * kStageBlocks;
  static constexpr int kStages = (kMaxSmem - 4096) / (kWeightBytes + kRowBytes);  // 4, 7, 4 of 49, 31, 45 KB
  static constexpr int kTaskRing = 3;

  struct Shared {
    alignas(1024) uint8_t rows[kStages][kRowBytes];
    alignas(128) uint8_t weights[kStages][kWeightBytes];
    uint64_t full[kStages], empty[kStages];
    TiledTask task[kTaskRing];
    int32_t slot[kTaskRing][kMaxRows];  // of the task's rows, and their routing weights
    float rho[kTaskRing][kMaxRows];
    float alpha[kTaskRing][3];
    uint64_t task_full[kTaskRing], task_empty[kTaskRing], meta_full[kTaskRing];
  };
  static_assert(sizeof(Shared) <= kMaxSmem);
};

// Weights of the blocks that the last stage of a task lacks.
alignas(128) static __device__ const uint8_t kZeroBlock[kMoeBlockBytes] = {};  // the copy engine wants 16

template <int kStages>
struct TiledRing {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// Four 32-bit values per 8x8 matrix of b16: thread (row g, columns 2t, 2t + 1) -> the transposed matrix.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
// A value every lane has: into a uniform register, where wgmma wants its descriptors (a third of the ALU work was theirs).
template <class V>
__device__ __forceinline__ V uniform(V v) {
  return __shfl_sync(0xffffffffu, v, 0);
}

struct TiledWork {  // what all roles derive from a task
  int blocks, strips, first_strip, num_strips;
  const uint8_t* weights;
};
template <class T>
__device__ __forceinline__ TiledWork tiled_work(const MoeTiledArgs& args, const TiledTask& task) {
  TiledWork work;
  work.blocks = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  work.strips = static_cast<int>(task.is_fc2 ? moe_fc2_strips(args.shape.hidden) : moe_fc1_strips(args.shape.inter));
  work.first_strip = task.block * kStrips;
  work.num_strips = min(kStrips, work.strips - work.first_strip);
  work.weights = (task.is_fc2 ? args.experts.fc2 : args.experts.fc1) +
                 (static_cast<int64_t>(task.expert) * work.strips + work.first_strip) * work.blocks * kMoeBlockBytes;
  return work;
}

// Strips of fc1 that are finished for the task's tile.
template <class T>
__device__ __forceinline__ uint32_t& tiled_done(const MoeTiledArgs& args, const TiledTask& task) {
  return args.routing.tile_done[static_cast<int>(T::kList) * args.routing.max_tiles + task.tile];
}

// The copying warps run with all lanes and keep what they compute uniform: the copy instruction takes its operands from uniform
// registers, and is wrapped in a loop over the lanes where the compiler cannot tell (217 instructions a stage, a tenth of all).

// This loader's stages of one task: every kLoaders-th. One warp alone takes about 350 ns a stage, too long.
template <class T>
__device__ __forceinline__ void tiled_copy_weights(const MoeTiledArgs& args, typename T::Shared& shared, const TiledTask& task,
                                                   TiledRing<T::kStages>& at, int& turn, int self) {
  const TiledWork work = tiled_work<T>(args, task);
  const uint64_t source = uniform(reinterpret_cast<uint64_t>(work.weights));
  const int blocks = uniform(work.blocks), strips = uniform(work.num_strips), pitch = blocks * kMoeBlockBytes;
  for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance(), turn = (turn + 1) % kLoaders) {
    if (turn != self) continue;
    spin_until([&] { return mbarrier_try_wait_long(&shared.empty[at.stage], at.phase ^ 1); }, "moe tiled: stage for weights", task.tile, block);
    if (ptx::elect_one()) {
      uint64_t* full = &shared.full[at.stage];
      ptx::mbarrier_arrive_expect_tx(full, T::kStripStageBytes * strips);
      const uint8_t* from = reinterpret_cast<const uint8_t*>(source) + static_cast<int64_t>(block) * kMoeBlockBytes;
      uint8_t* to = shared.weights[at.stage];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        if (strip >= strips) break;
        const int bytes = min(T::kStageBlocks, blocks - block) * kMoeBlockBytes;
        ptx::bulk_load(to + strip * T::kStripStageBytes, from + strip * pitch, bytes, full, ptx::L2Hint::kEvictFirst);
        for (int missing = bytes; missing < T::kStripStageBytes; missing += kMoeBlockBytes)
          ptx::bulk_load(to + strip * T::kStripStageBytes + missing, kZeroBlock, kMoeBlockBytes, full);
      }
    }
    __syncwarp();
  }
}

// Draws tickets, tells the other roles, and copies weights as loader 0.
template <class T>
__device__ __forceinline__ void tiled_schedule(const MoeTiledArgs& args, typename T::Shared& shared, TiledPhase phase) {
  const int lane = threadIdx.x % 32;
  const int blocks1 = (static_cast<int>(moe_fc1_strips(args.shape.inter)) + kStrips - 1) / kStrips;
  const int blocks2 = (static_cast<int>(moe_fc2_strips(args.shape.hidden)) + kStrips - 1) / kStrips;
  constexpr int kList = static_cast<int>(T::kList);
  const MoeTile* list = args.routing.tiles + kList * args.routing.max_tiles;
  const int tiles = args.routing.num_tiles[kList];
  const int tasks1 = phase == TiledPhase::kFc2 ? 0 : tiles * blocks1, tasks = tasks1 + (phase == TiledPhase::kFc1 ? 0 : tiles * blocks2);
  uint32_t* ticket = &args.routing.ticket[kList * 2 + (phase == TiledPhase::kFc2 ? 1 : 0)];
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int turn = 0;
  uint32_t drawn = lane == 0 ? atomicAdd(ticket, 1u) : 0;
  while (true) {
    const int v = static_cast<int>(uniform(drawn));
    TiledTask task{};
    task.tile = -1;
    if (v < tasks) {
      task.is_fc2 = v >= tasks1;
      const int w = task.is_fc2 ? v - tasks1 : v, blocks = task.is_fc2 ? blocks2 : blocks1;
      task.tile = w / blocks;
      task.block = w - task.tile * blocks;
      const MoeTile tile = list[task.tile];
      task.expert = tile.expert, task.first_row = tile.first_row, task.rows = tile.rows, task.padded = tile.padded;
    }
    spin_until([&] { return mbarrier_try_wait_long(&shared.task_empty[task_at.stage], task_at.phase ^ 1); }, "moe tiled: task slot", v, 0);
    if (lane == 0) {
      shared.task[task_at.stage] = task;
      ptx::mbarrier_arrive(&shared.task_full[task_at.stage]);
    }
    __syncwarp();
    task_at.advance();
    if (task.tile < 0) return;
    if (lane == 0) drawn = atomicAdd(ticket, 1u);  // early: its latency hides behind this task
    tiled_copy_weights<T>(args, shared, task, at, turn, 0);
  }
}

// The other weight loaders follow the tasks.
template <class T>
__device__ __forceinline__ void tiled_load_weights(const MoeTiledArgs& args, typename T::Shared& shared, int self) {
  const int lane = threadIdx.x % 32;
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int turn = 0;
  while (true) {
    spin_until([&] { return mbarrier_try_wait_long(&shared.task_full[task_at.stage], task_at.phase); }, "moe tiled: a task", 2, 0);
    const TiledTask task = shared.task[task_at.stage];
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.task_empty[task_at.stage]);
    task_at.advance();
    if (task.tile < 0) return;
    tiled_copy_weights<T>(args, shared, task, at, turn, self);
  }
}

// Loader 0 also brings what the epilogue wants to know of the task's rows.
template <class T>
__device__ __forceinline__ void tiled_load_rows(const MoeTiledArgs& args, typename T::Shared& shared, TiledPhase phase, int self) {
  const int lane = threadIdx.x % 32;
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int turn = 0;
  const uint32_t strips1 = static_cast<uint32_t>(moe_fc1_strips(args.shape.inter));
  while (true) {
    spin_until([&] { return mbarrier_try_wait_long(&shared.task_full[task_at.stage], task_at.phase); }, "moe tiled: a task", 0, 0);
    const TiledTask task = shared.task[task_at.stage];
    if (task.tile < 0) return;
    if (task.is_fc2 && phase == TiledPhase::kBoth) {
      spin_until([&] { return load_acquire(&tiled_done<T>(args, task)) >= strips1; }, "moe tiled: h of a tile", task.tile, strips1);
      fence_proxy_async_all();
    }
    const int blocks = uniform(tiled_work<T>(args, task).blocks);
    const bf16* operand = task.is_fc2 ? args.h_rows : args.x_rows;
    const uint64_t source = uniform(reinterpret_cast<uint64_t>(operand) + static_cast<uint64_t>(task.first_row) * blocks * 128);
    const uint32_t bytes = uniform(task.padded * 128);  // of one block
    for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance(), turn = (turn + 1) % kLoaders) {
      if (turn != self) continue;
      spin_until([&] { return mbarrier_try_wait_long(&shared.empty[at.stage], at.phase ^ 1); }, "moe tiled: stage for rows", task.tile, block);
      if (ptx::elect_one()) {
        uint64_t* full = &shared.full[at.stage];
        ptx::mbarrier_arrive_expect_tx(full, T::kStageBlocks * bytes);
        const uint8_t* from = reinterpret_cast<const uint8_t*>(source) + static_cast<int64_t>(block) * bytes;
        const int present = min(T::kStageBlocks, blocks - block);
        ptx::bulk_load(shared.rows[at.stage], from, present * bytes, full);
        for (int i = present; i < T::kStageBlocks; ++i) ptx::bulk_load(shared.rows[at.stage] + i * bytes, from, bytes, full);  // times zeros
      }
      __syncwarp();
    }
    if (self == 0) {
      for (int row = lane; row < task.padded; row += 32) {
        const int slot = row < task.rows ? args.routing.row_slot[task.first_row + row] : -1;
        shared.slot[task_at.stage][row] = slot;
        shared.rho[task_at.stage][row] = slot >= 0 ? args.topk_weights[slot] : 0.0f;  // padding: rows of whatever memory held
      }
      if (lane < 3) shared.alpha[task_at.stage][lane] = args.experts.alpha[task.expert * 3 + lane] * kMoeAlphaScale;
      ptx::mbarrier_arrive(&shared.meta_full[task_at.stage]);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.task_empty[task_at.stage]);
    task_at.advance();
  }
}

// fc1: two gate/up values per token pair -> h in operand order, or (a4) binary32.
template <int kN>
__device__ __forceinline__ void tiled_finish_fc1(const MoeTiledArgs& args, const TiledTask& task, const float* rho, const float* alpha,
                                                 int strip, const float (&sum)[kN / 2], int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float alpha_gate = alpha[0], alpha_up = alpha[1];
  const int chunk = (strip & 1) * 4 + warp;
  uint8_t* target = reinterpret_cast<uint8_t*>(args.h_rows) + static_cast<int64_t>(task.first_row) * args.shape.inter * 2 +
                    static_cast<int64_t>(strip >> 1) * task.padded * 128 + g * 128 + ((chunk ^ g) << 4) + t * 4;
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    if (tile * 8 >= task.padded) break;  // the instance may be wider than the tile
    asm volatile("" ::: "memory");       // one tile at a time: the sums fill the registers
    float h[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile * 8 + 2 * t + i;
      float gate_alpha = alpha_gate, up_alpha = alpha_up;
      if (args.x_global) {
        const float global = args.x_global[task.first_row + min(row, task.rows - 1)];
        gate_alpha = alpha_gate * global, up_alpha = alpha_up * global;
      }
      const uint32_t rounded = pack_bf16(sum[tile * 4 + i] * gate_alpha, sum[tile * 4 + 2 + i] * up_alpha);
      h[i] = swiglu_device_unlimited(__uint_as_float(rounded << 16), __uint_as_float(rounded & 0xffff0000u), rho[row], args.swiglu_limit);
      if (args.h_wide && row < task.rows)
        args.h_wide[static_cast<int64_t>(task.first_row + row) * args.shape.inter + moe_fc1_row(strip, warp, g)] = h[i];
    }
    if (!args.h_wide) *reinterpret_cast<uint32_t*>(target + tile * 1024) = transpose_8x8(pack_bf16(h[0], h[1]));
  }
}

template <int kN>
__device__ __forceinline__ void tiled_finish_fc2(const MoeTiledArgs& args, const TiledTask& task, const int32_t* slots, float alpha,
                                                 int strip, const float (&sum)[kN / 2], int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  bf16* target = args.slot_y + strip * 64 + warp * 16 + 4 * t;
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    asm volatile("" ::: "memory");
    float scale[2] = {alpha, alpha};
    if (args.h_global) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scale[i] = alpha * args.h_global[task.first_row + min(tile * 8 + 2 * t + i, task.rows - 1)];
    }
    const uint32_t low = transpose_8x8(pack_bf16(sum[tile * 4] * scale[0], sum[tile * 4 + 1] * scale[1]));
    const uint32_t high = transpose_8x8(pack_bf16(sum[tile * 4 + 2] * scale[0], sum[tile * 4 + 3] * scale[1]));
    const int row = tile * 8 + g;
    if (row < task.rows)
      *reinterpret_cast<uint2*>(target + static_cast<int64_t>(slots[row]) * args.shape.hidden) =
          make_uint2(low, high);
  }
}

struct TiledCodes {  // a thread's share of a 64x64 block
  uint4 words;
  uint32_t sf_low, sf_high;
};
__device__ __forceinline__ void fetch_codes(TiledCodes& codes, uint32_t codes_at, uint32_t scales_at, uint32_t block) {
  load_shared_16(codes.words, codes_at + block);
  codes.sf_low = load_shared_u8(scales_at + block);
  codes.sf_high = load_shared_u8(scales_at + block + 1);
}

// Sums of 64 weight rows times kN token rows over all of K, by a warpgroup.
template <class T, int kN>
__device__ __forceinline__ void tiled_sums_wgmma(const MoeTiledArgs& args, typename T::Shared& shared, const TiledTask& task,
                                                 TiledRing<T::kStages>& at, float (&sum)[kN / 2], int group, int thread) {
  const int lane = thread % 32;
  uint32_t a[2][2][4];
  const uint32_t weights = ptx::smem_address(shared.weights) + group * T::kStripStageBytes;
  const uint32_t codes_at = weights + thread * 16, scales_at = weights + kMoeBlockCodeBytes + thread * 2;
  const uint32_t second = uniform(task.padded * (128 / 16));  // from the stage's first block of token rows to its second, in descriptor units
  const uint32_t rows = ptx::smem_address(shared.rows);
  TiledCodes codes[2];  // of the stage's two blocks; the next stage's first is fetched while the last one's products run
  int left = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  const auto fetch = [&](int k) {
    fetch_codes(codes[k], codes_at, scales_at, at.stage * T::kWeightBytes + k * kMoeBlockBytes);
  };
  const auto wait_stage = [&] {
    spin_until([&] { return mbarrier_try_wait_long(&shared.full[at.stage], at.phase); }, "moe tiled: stage filled", left, at.stage);
  };
  constexpr bool kEarly = kN <= kSmallTileRows;  // wider instances have no registers to spare
  if (kEarly) {
    wait_stage();
    fetch(0);
  }
#pragma unroll 1
  for (; left > 0; left -= T::kStageBlocks) {
    const uint32_t first = uniform(wgmma_descriptor_low(rows + at.stage * T::kRowBytes));
    uint64_t* empty = &shared.empty[at.stage];
    if (!kEarly) {
      wait_stage();
      fetch(0);
    }
    if (kEarly) fetch(1);
#pragma unroll
    for (int k = 0; k < T::kStageBlocks; ++k) {
      const uint32_t sf_low = decode_sf(codes[k].sf_low), sf_high = decode_sf(codes[k].sf_high);
      const uint4 words = codes[k].words;
      const uint32_t tokens = first + (k ? second : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        decode_half_block(half ? words.y : words.x, half ? words.w : words.z, sf_low, sf_high, a[half]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          Wgmma<kN>::mma(sum, a[half][step], wgmma_descriptor_of(tokens + (half * 2 + step) * 2));
        wgmma_commit();
      }
      if (k + 1 < T::kStageBlocks) {
        if (!kEarly) fetch(k + 1);
      } else {
        at.advance();
        if (kEarly && left > T::kStageBlocks) {
          wait_stage();
          fetch(0);
        }
      }
      wgmma_wait<0>();  // the other warpgroups decode and multiply meanwhile; a pipeline here makes ptxas serialise (C7512)
    }
    if (lane == 0) ptx::mbarrier_arrive(empty);
  }
}

// The same with mma.sync: below three n8 tiles it takes fewer instructions than wgmma with its descriptors, fences and drains, and
// no warp waits for another.
template <class T, int kN>
__device__ __forceinline__ void tiled_sums_mma(const MoeTiledArgs& args, typename T::Shared& shared, const TiledTask& task,
                                               TiledRing<T::kStages>& at, float (&sum)[kN / 2], int group, int thread) {
  const int lane = thread % 32;
  const uint32_t weights = ptx::smem_address(shared.weights) + group * T::kStripStageBytes;
  const uint32_t codes_at = weights + thread * 16, scales_at = weights + kMoeBlockCodeBytes + thread * 2;
  const uint32_t pitch = task.padded * 128;  // from one block of token rows to the next
  const uint32_t rows_at = ptx::smem_address(shared.rows) + (lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4);
#pragma unroll 1
  for (int left = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols; left > 0; left -= T::kStageBlocks) {
    const uint32_t stage = at.stage * T::kWeightBytes;
    uint32_t rows = rows_at + at.stage * T::kRowBytes;
    spin_until([&] { return mbarrier_try_wait_long(&shared.full[at.stage], at.phase); }, "moe tiled: stage filled", left, at.stage);
    TiledCodes codes[2];
    uint32_t b[2][kN / 8][8];
    const auto fetch = [&](int k) {
      fetch_codes(codes[k % 2], codes_at, scales_at, stage + k * kMoeBlockBytes);
#pragma unroll
      for (int tile = 0; tile < kN / 8; ++tile) {
        load_matrix_x4(b[k % 2][tile], rows + tile * 1024);
        load_matrix_x4(b[k % 2][tile] + 4, (rows ^ 64) + tile * 1024);
      }
      rows += pitch;
    };
    fetch(0);
#pragma unroll
    for (int k = 0; k < T::kStageBlocks; ++k) {
      if (k + 1 < T::kStageBlocks) fetch(k + 1);
      const TiledCodes& c = codes[k % 2];
      const uint32_t sf_low = decode_sf(c.sf_low), sf_high = decode_sf(c.sf_high);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        decode_half_block(half ? c.words.y : c.words.x, half ? c.words.w : c.words.z, sf_low, sf_high, a);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int tile = 0; tile < kN / 8; ++tile)
            mma_bf16(&sum[tile * 4], a[step], b[k % 2][tile][half * 4 + step * 2], b[k % 2][tile][half * 4 + step * 2 + 1]);
      }
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.empty[at.stage]);
    at.advance();
  }
}

template <class T, int kN>
__device__ __forceinline__ void tiled_task(const MoeTiledArgs& args, typename T::Shared& shared, const TiledTask& task, int slot,
                                           uint32_t phase, TiledRing<T::kStages>& at) {
  int tid;  // volatile: keeps addresses of all instances from being hoisted, which costs registers and serialises wgmma
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
  const int group = tid / 128, warp = (tid / 32) % 4, lane = tid % 32, thread = tid % 128;
  float sum[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum[i] = 0.0f;
  if constexpr (T::kList == TileList::kTiny)
    tiled_sums_mma<T, kN>(args, shared, task, at, sum, group, thread);
  else
    tiled_sums_wgmma<T, kN>(args, shared, task, at, sum, group, thread);
  const TiledWork work = tiled_work<T>(args, task);
  spin_until([&] { return mbarrier_try_wait_long(&shared.meta_full[slot], phase); }, "moe tiled: rows of a task", task.tile, 0);
  if (group < work.num_strips) {
    if (task.is_fc2) {
      tiled_finish_fc2<kN>(args, task, shared.slot[slot], shared.alpha[slot][2], work.first_strip + group, sum, warp, lane);
    } else {
      tiled_finish_fc1<kN>(args, task, shared.rho[slot], shared.alpha[slot], work.first_strip + group, sum, warp, lane);
      fence_proxy_async_all();  // h: ordinary stores here, copy engine there
      ptx::named_barrier_sync(1 + group, 128);
      if (thread == 0) add_release(&tiled_done<T>(args, task), 1);
    }
  }
}

// The narrowest instance that holds the tile.
template <class T, int kN, int... kWider>
__device__ __forceinline__ void tiled_dispatch(const MoeTiledArgs& args, typename T::Shared& shared, const TiledTask& task, int slot,
                                               uint32_t phase, TiledRing<T::kStages>& at) {
  if constexpr (sizeof...(kWider) == 0) {
    tiled_task<T, kN>(args, shared, task, slot, phase, at);
  } else {
    if (task.padded <= kN)
      tiled_task<T, kN>(args, shared, task, slot, phase, at);
    else
      tiled_dispatch<T, kWider...>(args, shared, task, slot, phase, at);
  }
}

template <class T>
__device__ __forceinline__ void tiled_math(const MoeTiledArgs& args, typename T::Shared& shared) {
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  while (true) {
    spin_until([&] { return mbarrier_try_wait_long(&shared.task_full[task_at.stage], task_at.phase); }, "moe tiled: a task", 1, 0);
    const TiledTask& task = shared.task[task_at.stage];  // stays in shared memory: registers are for sums
    if (task.tile < 0) return;
    if constexpr (T::kList == TileList::kLarge)
      tiled_dispatch<T, 56, 64, 72, 80, 88, 96, 104, 112, 120>(args, shared, task, task_at.stage, task_at.phase, at);
    else if constexpr (T::kList == TileList::kSmall)
      tiled_dispatch<T, 24, 32, 40, 48>(args, shared, task, task_at.stage, task_at.phase, at);
    else
      tiled_dispatch<T, 8, 16>(args, shared, task, task_at.stage, task_at.phase, at);
    ptx::mbarrier_arrive(&shared.task_empty[task_at.stage]);
    task_at.advance();
  }
}

// Before the tasks of a list: every thread of the CTA, from its role. False: nothing to do. Lists are independent, a CTA goes to
// the next when this one has no more tickets.
template <class T>
__device__ __forceinline__ bool tiled_begin(const MoeTiledArgs& args, typename T::Shared& shared) {
  if (args.routing.num_tiles[static_cast<int>(T::kList)] == 0) return false;
  ptx::named_barrier_sync(0, kTiledThreads);  // everybody has left the list before
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 2);                    // weights and rows
      ptx::mbarrier_init(&shared.empty[i], 4 * kMathWarpgroups);  // math warps
    }
    for (int i = 0; i < T::kTaskRing; ++i) {
      ptx::mbarrier_init(&shared.task_full[i], 1);
      ptx::mbarrier_init(&shared.task_empty[i], 2 * kLoaders - 1 + 128 * kMathWarpgroups);
      ptx::mbarrier_init(&shared.meta_full[i], 32);
    }
    ptx::fence_mbarrier_init();
  }
  fence_proxy_async_all();  // the list before read and wrote this memory in another layout
  ptx::named_barrier_sync(0, kTiledThreads);
  return true;
}

template <TileList kList>
__device__ __forceinline__ void tiled_load(const MoeTiledArgs& args, uint8_t* raw, TiledPhase phase, int loader) {
  using T = TiledTraits<kList>;
  auto& shared = *reinterpret_cast<typename T::Shared*>(raw);
  if (!tiled_begin<T>(args, shared)) return;
  if (loader >= kLoaders)
    tiled_load_rows<T>(args, shared, phase, loader - kLoaders);
  else if (loader == 0)
    tiled_schedule<T>(args, shared, phase);
  else
    tiled_load_weights<T>(args, shared, loader);
}
template <TileList kList>
__device__ __forceinline__ void tiled_compute(const MoeTiledArgs& args, uint8_t* raw) {
  using T = TiledTraits<kList>;
  auto& shared = *reinterpret_cast<typename T::Shared*>(raw);
  if (tiled_begin<T>(args, shared)) tiled_math<T>(args, shared);
}

static __global__ void __launch_bounds__(kTiledThreads, 1) moe_tiled_kernel(const __grid_constant__ MoeTiledArgs args, TiledPhase phase) {
  // No arithmetic on the base: the compiler would lose sight of its address space and use generic loads. There is no static
  // shared memory, so it stands at 1 KiB (what the system reserves); wgmma needs the alignment.
  extern __shared__ __align__(1024) uint8_t raw[];
  if (ptx::smem_address(raw) % 1024 != 0) __trap();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x >= 128 * kMathWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoaderRegisters));
    const int loader = static_cast<int>(threadIdx.x / 32) - 4 * kMathWarpgroups;
    tiled_load<TileList::kLarge>(args, raw, phase, loader);
    tiled_load<TileList::kSmall>(args, raw, phase, loader);
    tiled_load<TileList::kTiny>(args, raw, phase, loader);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMathRegisters));
    tiled_compute<TileList::kLarge>(args, raw);
    tiled_compute<TileList::kSmall>(args, raw);
    tiled_compute<TileList::kTiny>(args, raw);
  }
}

}  // namespace dsv4::sm90
