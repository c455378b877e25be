// Tiled tier of the MoE layer on Hopper: fc1 with SwiGLU and fc2 over sorted token rows, one persistent launch.
//
// Task = 4 or 8 strips of 64 weight rows x one tile of up to 120 token rows of one expert; tiles stand in three lists by size (moe_sm90.h),
// worked through one after the other, each with its own division of shared memory. Tickets of a list are drawn from a global counter,
// all of fc1 first, then fc2, which waits for the tile_done counter of its rows: tickets are handed out in order, so what a
// CTA waits for is always held by a running CTA. Warps: four math warpgroups with one strip each, or two, a warp that draws tickets
// and copies weights (never waiting for fc1), another for weights, and two that copy token rows. Weights are decoded in registers and used as the
// register operand of wgmma m64nNk16, N = the tile's rows rounded up to 8, or, to 16 rows, of mma.sync; no decoded weight is ever stored.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

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
  int slot;  // its place in the ring of tasks, and the phase of its barriers: math warps have no registers for them
  uint32_t phase;
};

constexpr int kMathWarpgroups = 4;
constexpr int kMathRegisters = 104, kLoaderRegisters = 64;  // 96 at launch, moved by setmaxnreg
constexpr int kLoaders = 2;                                 // warps that copy weights, and as many that copy rows
constexpr int kTiledThreads = 128 * kMathWarpgroups + 64 * kLoaders;
constexpr int kMaxSmem = 227 * 1024;

// At the start of shared memory: barriers and tasks of each list. Nothing of it serves two lists, so all barriers are initialised once, before
// the roles part.
constexpr int kMaxStages = 8, kTaskRing = 3;
template <int kMaxRows>
struct TiledControl {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t task_full[kTaskRing], task_empty[kTaskRing], meta_full[kTaskRing];
  TiledTask task[kTaskRing];
  int32_t slot[kTaskRing][kMaxRows];  // of the task's rows, and their routing weights
  float rho[kTaskRing][kMaxRows];
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
  static constexpr int kStageBlocks = kList == TileList::kTiny ? 4 : 2;   // K256, K128
  static constexpr int kGroupStrips = kList == TileList::kSmall ? 2 : 1;  // of a warpgroup
  static constexpr int kStrips = kMathWarpgroups * kGroupStrips;          // of a task
  static constexpr int kStripStageBytes = kStageBlocks * kMoeBlockBytes;
  static constexpr int kWeightBytes = kStrips * kStripStageBytes;
  static constexpr int kBlockPitch = kMaxRows * 128;  // from the rows of one block to those of the next
  static constexpr int kRowBytes = kStageBlocks * kBlockPitch;
  static constexpr int kStages = (kMaxSmem - kHeaderBytes) / (kWeightBytes + kRowBytes);
  static constexpr int kWeightsAt = kHeaderBytes + kStages * kRowBytes;
  static constexpr int kSmemBytes = kWeightsAt + kStages * kWeightBytes;
  static_assert(kStages <= kMaxStages && kRowBytes % 1024 == 0 && kSmemBytes <= kMaxSmem);
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

// A value as it is, but not to be computed anew in every stage to spare its register.
__device__ __forceinline__ uint32_t opaque(uint32_t v) { return __shfl_sync(0xffffffffu, v, threadIdx.x % 32); }
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
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
  work.first_strip = task.block * T::kStrips;
  work.num_strips = min(T::kStrips, work.strips - work.first_strip);
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
__device__ __forceinline__ void tiled_copy_weights(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                                   TiledRing<T::kStages>& at, int& turn, int self) {
  const TiledWork work = tiled_work<T>(args, task);
  const uint64_t source = uniform(reinterpret_cast<uint64_t>(work.weights));
  const int blocks = uniform(work.blocks), strips = uniform(work.num_strips), pitch = blocks * kMoeBlockBytes;
  auto& control = tiled_control<T>(shared);
  for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance(), turn = (turn + 1) % kLoaders) {
    if (turn != self) continue;
    spin_until([&] { return mbarrier_try_wait_long(&control.empty[at.stage], at.phase ^ 1); },
               "moe tiled: stage for weights", task.tile, block);
    if (ptx::elect_one()) {
      uint64_t* full = &control.full[at.stage];
      ptx::mbarrier_arrive_expect_tx(full, T::kStripStageBytes * strips);
      const uint8_t* from = reinterpret_cast<const uint8_t*>(source) + static_cast<int64_t>(block) * kMoeBlockBytes;
      uint8_t* to = tiled_weights<T>(shared, at.stage);
#pragma unroll
      for (int strip = 0; strip < T::kStrips; ++strip) {
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
__device__ __forceinline__ void tiled_schedule(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase) {
  const int lane = threadIdx.x % 32;
  const int blocks1 = (static_cast<int>(moe_fc1_strips(args.shape.inter)) + T::kStrips - 1) / T::kStrips;
  const int blocks2 = (static_cast<int>(moe_fc2_strips(args.shape.hidden)) + T::kStrips - 1) / T::kStrips;
  constexpr int kList = static_cast<int>(T::kList);
  const MoeTile* list = args.routing.tiles + kList * args.routing.max_tiles;
  const int tiles = args.routing.num_tiles[kList];
  const int tasks1 = phase == TiledPhase::kFc2 ? 0 : tiles * blocks1,
            tasks = tasks1 + (phase == TiledPhase::kFc1 ? 0 : tiles * blocks2);
  uint32_t* ticket = &args.routing.ticket[kList * 2 + (phase == TiledPhase::kFc2 ? 1 : 0)];
  auto& control = tiled_control<T>(shared);
  TiledRing<kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int turn = 0;
  uint32_t drawn = lane == 0 ? atomicAdd(ticket, 1u) : 0;
  while (true) {
    const int v = static_cast<int>(uniform(drawn));
    TiledTask task{};
    task.tile = -1;
    task.slot = task_at.stage, task.phase = task_at.phase;
    if (v < tasks) {
      task.is_fc2 = v >= tasks1;
      const int w = task.is_fc2 ? v - tasks1 : v, blocks = task.is_fc2 ? blocks2 : blocks1;
      task.tile = w / blocks;
      task.block = w - task.tile * blocks;
      const MoeTile tile = list[task.tile];
      task.expert = tile.expert, task.first_row = tile.first_row, task.rows = tile.rows, task.padded = tile.padded;
    }
    spin_until([&] { return mbarrier_try_wait_long(&control.task_empty[task_at.stage], task_at.phase ^ 1); },
               "moe tiled: task slot", v, 0);
    if (lane == 0) {
      control.task[task_at.stage] = task;
      ptx::mbarrier_arrive(&control.task_full[task_at.stage]);
    }
    __syncwarp();
    task_at.advance();
    if (task.tile < 0) return;
    if (lane == 0) drawn = atomicAdd(ticket, 1u);  // early: its latency hides behind this task
    tiled_copy_weights<T>(args, shared, task, at, turn, 0);
  }
}

// For a task, in the warps that copy but do not draw tickets. The second wait is over before it begins, because who wrote the task has waited
// for the same; it lets racecheck see that the readers of what is overwritten next are done (a stage's readers arrive by lane 0 alone).
template <class Control>
__device__ __forceinline__ void tiled_follow(Control& control, const TiledRing<kTaskRing>& at, int role) {
  spin_until([&] { return mbarrier_try_wait_long(&control.task_full[at.stage], at.phase); }, "moe tiled: a task", role,
             0);
  spin_until([&] { return mbarrier_try_wait_long(&control.task_empty[at.stage], at.phase ^ 1); },
             "moe tiled: the task before", role, 0);
}

// The other weight loaders follow the tasks.
template <class T>
__device__ __forceinline__ void tiled_load_weights(const MoeTiledArgs& args, TiledShared& shared, int self) {
  const int lane = threadIdx.x % 32;
  auto& control = tiled_control<T>(shared);
  TiledRing<kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int turn = 0;
  while (true) {
    tiled_follow(control, task_at, 2);
    const TiledTask task = control.task[task_at.stage];
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&control.task_empty[task_at.stage]);
    task_at.advance();
    if (task.tile < 0) return;
    tiled_copy_weights<T>(args, shared, task, at, turn, self);
  }
}

// Loader 0 also brings what the epilogue wants to know of the task's rows.
template <class T>
__device__ __forceinline__ void tiled_load_rows(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase,
                                                int self) {
  const int lane = threadIdx.x % 32;
  auto& control = tiled_control<T>(shared);
  TiledRing<kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int turn = 0;
  const uint32_t strips1 = static_cast<uint32_t>(moe_fc1_strips(args.shape.inter));
  while (true) {
    tiled_follow(control, task_at, 0);
    const TiledTask task = control.task[task_at.stage];
    if (task.tile < 0) return;
    if (task.is_fc2 && phase == TiledPhase::kBoth) {
      spin_until([&] { return load_acquire(&tiled_done<T>(args, task)) >= strips1; }, "moe tiled: h of a tile",
                 task.tile, strips1);
      fence_proxy_async_all();
    }
    const int blocks = uniform(tiled_work<T>(args, task).blocks);
    const bf16* operand = task.is_fc2 ? args.h_rows : args.x_rows;
    const uint64_t source =
        uniform(reinterpret_cast<uint64_t>(operand) + static_cast<uint64_t>(task.first_row) * blocks * 128);
    const uint32_t bytes = uniform(task.padded * 128);  // of one block
    for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance(), turn = (turn + 1) % kLoaders) {
      if (turn != self) continue;
      spin_until([&] { return mbarrier_try_wait_long(&control.empty[at.stage], at.phase ^ 1); },
                 "moe tiled: stage for rows", task.tile, block);
      if (ptx::elect_one()) {
        uint64_t* full = &control.full[at.stage];
        ptx::mbarrier_arrive_expect_tx(full, T::kStageBlocks * bytes);
        const uint8_t* from = reinterpret_cast<const uint8_t*>(source) + static_cast<int64_t>(block) * bytes;
        uint8_t* to = tiled_rows<T>(shared, at.stage);
#pragma unroll
        for (int i = 0; i < T::kStageBlocks; ++i)  // a block that the task lacks: any, it meets zeros
          ptx::bulk_load(to + i * T::kBlockPitch, from + (block + i < blocks ? i * bytes : 0), bytes, full);
      }
      __syncwarp();
    }
    if (self == 0) {
      for (int row = lane; row < task.padded; row += 32) {
        const int slot = row < task.rows ? args.routing.row_slot[task.first_row + row] : -1;
        control.slot[task_at.stage][row] = slot;
        control.rho[task_at.stage][row] =
            slot >= 0 ? args.topk_weights[slot] : 0.0f;  // padding: rows of whatever memory held
      }
      if (lane < 3) control.alpha[task_at.stage][lane] = args.experts.alpha[task.expert * 3 + lane] * kMoeAlphaScale;
      ptx::mbarrier_arrive(&control.meta_full[task_at.stage]);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&control.task_empty[task_at.stage]);
    task_at.advance();
  }
}

// fc1: two gate/up values per token pair -> h in operand order, or (a4) binary32.
template <int kN>
__device__ __forceinline__ void tiled_finish_fc1(const MoeTiledArgs& args, const TiledTask& task, const float* rho,
                                                 const float* alpha, int strip, const float (&sum)[kN / 2], int warp,
                                                 int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float alpha_gate = alpha[0], alpha_up = alpha[1];
  const int chunk = (strip & 1) * 4 + warp;
  uint8_t* target = reinterpret_cast<uint8_t*>(args.h_rows) +
                    static_cast<int64_t>(task.first_row) * args.shape.inter * 2 +
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
      h[i] = swiglu_device_unlimited(__uint_as_float(rounded << 16), __uint_as_float(rounded & 0xffff0000u), rho[row],
                                     args.swiglu_limit);
      if (args.h_wide && row < task.rows)
        args.h_wide[static_cast<int64_t>(task.first_row + row) * args.shape.inter + moe_fc1_row(strip, warp, g)] = h[i];
    }
    if (!args.h_wide) *reinterpret_cast<uint32_t*>(target + tile * 1024) = transpose_8x8(pack_bf16(h[0], h[1]));
  }
}

template <int kN>
__device__ __forceinline__ void tiled_finish_fc2(const MoeTiledArgs& args, const TiledTask& task, const int32_t* slots,
                                                 float alpha, int strip, const float (&sum)[kN / 2], int warp,
                                                 int lane) {
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
      *reinterpret_cast<uint2*>(target + static_cast<int64_t>(slots[row]) * args.shape.hidden) = make_uint2(low, high);
  }
}

struct TiledCodes {  // a thread's share of a 64x64 block
  uint4 words;
  uint32_t sf_low, sf_high;
};
// Of the block kOffset bytes into the stage whose codes and scales begin at the two addresses for this thread.
template <int kOffset>
__device__ __forceinline__ void fetch_codes(TiledCodes& codes, uint32_t codes_at, uint32_t scales_at) {
  load_shared_16<kOffset>(codes.words, codes_at);
  codes.sf_low = load_shared_u8<kOffset>(scales_at);
  codes.sf_high = load_shared_u8<kOffset + 1>(scales_at);
}
template <class F, int... kI>
__device__ __forceinline__ void static_for_each(std::integer_sequence<int, kI...>, const F& f) {
  (f(std::integral_constant<int, kI>{}), ...);
}
// f(0), f(1), ..., f(kCount - 1), the argument known at compile time.
template <int kCount, class F>
__device__ __forceinline__ void static_for(const F& f) {
  static_for_each(std::make_integer_sequence<int, kCount>{}, f);
}

// Sums of 64 weight rows a strip times kN token rows over all of K, by a warpgroup.
template <class T, int kN>
__device__ __forceinline__ void tiled_sums_wgmma(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                                 TiledRing<T::kStages>& at, float (&sum)[T::kGroupStrips][kN / 2],
                                                 int group, int thread) {
  constexpr int kBlocks =
      T::kStageBlocks * T::kGroupStrips;  // of this warpgroup in a stage: strips of one column after another
  constexpr bool kEarly =
      kN <=
      kSmallTileRows;  // the next stage's first codes are fetched while products run: wider instances lack registers
  const int lane = thread % 32;
  const uint32_t base = ptx::smem_address(&shared),
                 weights = base + T::kWeightsAt + group * T::kGroupStrips * T::kStripStageBytes;
  const uint32_t codes_at = opaque(weights + thread * 16),
                 scales_at = opaque(weights + kMoeBlockCodeBytes + thread * 2);
  const uint32_t rows = opaque(wgmma_descriptor_low(base + kHeaderBytes));
  const uint32_t control = opaque(ptx::smem_address(&tiled_control<T>(shared)));
  using Control = std::remove_reference_t<decltype(tiled_control<T>(shared))>;
  uint32_t a[2][2][4];
  TiledCodes codes[2];  // in turn
  int stage = at.stage;
  uint32_t phase = at.phase;
  int left = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  uint32_t stage_codes, stage_scales;
  const auto begin_stage = [&] {
    spin_until([&] { return mbarrier_try_wait_long(control + offsetof(Control, full) + stage * 8, phase); },
               "moe tiled: stage filled", left, stage);
    stage_codes = codes_at + stage * T::kWeightBytes, stage_scales = scales_at + stage * T::kWeightBytes;
    fetch_codes<0>(codes[0], stage_codes, stage_scales);
  };
  if (kEarly) begin_stage();
#pragma unroll 1
  for (; left > 0; left -= T::kStageBlocks) {
    if (!kEarly) begin_stage();
    const uint32_t first = uniform(rows + stage * (T::kRowBytes / 16));
    const uint32_t empty = control + offsetof(Control, empty) + stage * 8;
    static_for<kBlocks>([&](auto index) {
      constexpr int i = decltype(index)::value, strip = i % T::kGroupStrips, k = i / T::kGroupStrips;
      constexpr bool kLast = i + 1 == kBlocks;
      constexpr int kNext =
          (i + 1) % T::kGroupStrips * T::kStripStageBytes + (i + 1) / T::kGroupStrips * kMoeBlockBytes;
      if constexpr (kEarly && !kLast) fetch_codes<kNext>(codes[(i + 1) % 2], stage_codes, stage_scales);
      const TiledCodes& c = codes[i % 2];
      const uint32_t sf_low = decode_sf(c.sf_low), sf_high = decode_sf(c.sf_high);
      const uint4 words = c.words;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        decode_half_block(half ? words.y : words.x, half ? words.w : words.z, sf_low, sf_high, a[half]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          // Adding to all 64 bits is one uniform instruction and no move; to the low half it was three.
          Wgmma<kN>::mma(sum[strip], a[half][step],
                         wgmma_descriptor_of(first) + (k * (T::kBlockPitch / 16) + (half * 2 + step) * 2));
        wgmma_commit();
      }
      if constexpr (kLast) {
        if (++stage == T::kStages) stage = 0, phase ^= 1;
        if (kEarly && left > T::kStageBlocks) begin_stage();
      } else if constexpr (!kEarly) {
        fetch_codes<kNext>(codes[(i + 1) % 2], stage_codes, stage_scales);
      }
      wgmma_wait<
          0>();  // the other warpgroups decode and multiply meanwhile; a pipeline here makes ptxas serialise (C7512)
    });
    __syncwarp();
    if (lane == 0) mbarrier_arrive_at(empty);
  }
  at.stage = stage, at.phase = phase;
}

// The same with mma.sync: below three n8 tiles it takes fewer instructions than wgmma with its descriptors, fences and drains, and
// no warp waits for another.
template <class T, int kN>
__device__ __forceinline__ void tiled_sums_mma(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                               TiledRing<T::kStages>& at, float (&sum)[1][kN / 2], int group,
                                               int thread) {
  const int lane = thread % 32;
  const uint32_t weights = ptx::smem_address(tiled_weights<T>(shared, 0)) + group * T::kStripStageBytes;
  const uint32_t codes_at = weights + thread * 16, scales_at = weights + kMoeBlockCodeBytes + thread * 2;
  const uint32_t rows_at =
      ptx::smem_address(tiled_rows<T>(shared, 0)) + (lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4);
  auto& control = tiled_control<T>(shared);
#pragma unroll 1
  for (int left = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols; left > 0;
       left -= T::kStageBlocks) {
    const uint32_t stage_codes = codes_at + at.stage * T::kWeightBytes,
                   stage_scales = scales_at + at.stage * T::kWeightBytes;
    const uint32_t rows = rows_at + at.stage * T::kRowBytes, far_rows = rows ^ 64;
    spin_until([&] { return mbarrier_try_wait_long(&control.full[at.stage], at.phase); }, "moe tiled: stage filled",
               left, at.stage);
    TiledCodes codes[2];
    uint32_t b[2][kN / 8][8];
    const auto fetch = [&](auto index) {
      constexpr int k = decltype(index)::value;
      fetch_codes<k * kMoeBlockBytes>(codes[k % 2], stage_codes, stage_scales);
      static_for<kN / 8>([&](auto tile) {
        constexpr int kAt = k * T::kBlockPitch + decltype(tile)::value * 1024;
        load_matrix_x4<kAt>(b[k % 2][decltype(tile)::value], rows);
        load_matrix_x4<kAt>(b[k % 2][decltype(tile)::value] + 4, far_rows);
      });
    };
    fetch(std::integral_constant<int, 0>{});
    static_for<T::kStageBlocks>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (k + 1 < T::kStageBlocks) fetch(std::integral_constant<int, k + 1>{});
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
            mma_bf16(&sum[0][tile * 4], a[step], b[k % 2][tile][half * 4 + step * 2],
                     b[k % 2][tile][half * 4 + step * 2 + 1]);
      }
    });
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&control.empty[at.stage]);
    at.advance();
  }
}

template <class T, int kN>
__device__ __forceinline__ void tiled_task(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                           TiledRing<T::kStages>& at) {
  int tid;  // volatile: keeps addresses of all instances from being hoisted, which costs registers and serialises wgmma
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
  const int group = tid / 128, warp = (tid / 32) % 4, lane = tid % 32, thread = tid % 128;
  float sum[T::kGroupStrips][kN / 2];
#pragma unroll
  for (int s = 0; s < T::kGroupStrips; ++s)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sum[s][i] = 0.0f;
  if constexpr (T::kList == TileList::kTiny)
    tiled_sums_mma<T, kN>(args, shared, task, at, sum, group, thread);
  else
    tiled_sums_wgmma<T, kN>(args, shared, task, at, sum, group, thread);
  const TiledWork work = tiled_work<T>(args, task);
  auto& control = tiled_control<T>(shared);
  const int slot = task.slot;
  const uint32_t phase = task.phase;
  spin_until([&] { return mbarrier_try_wait_long(&control.meta_full[slot], phase); }, "moe tiled: rows of a task",
             task.tile, 0);
  const int first = group * T::kGroupStrips,
            strips = min(T::kGroupStrips, work.num_strips - first);  // none, where the matrix ends before
#pragma unroll
  for (int s = 0; s < T::kGroupStrips; ++s) {
    if (s >= strips) break;
    const int strip = work.first_strip + first + s;
    if (task.is_fc2)
      tiled_finish_fc2<kN>(args, task, control.slot[slot], control.alpha[slot][2], strip, sum[s], warp, lane);
    else
      tiled_finish_fc1<kN>(args, task, control.rho[slot], control.alpha[slot], strip, sum[s], warp, lane);
  }
  if (!task.is_fc2 && strips > 0) {
    fence_proxy_async_all();  // h: ordinary stores here, copy engine there
    ptx::named_barrier_sync(1 + group, 128);
    if (thread == 0) add_release(&tiled_done<T>(args, task), strips);
  }
}

// The narrowest instance that holds the tile.
template <class T, int kN, int... kWider>
__device__ __forceinline__ void tiled_dispatch(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                               TiledRing<T::kStages>& at) {
  if constexpr (sizeof...(kWider) == 0) {
    tiled_task<T, kN>(args, shared, task, at);
  } else {
    if (task.padded <= kN)
      tiled_task<T, kN>(args, shared, task, at);
    else
      tiled_dispatch<T, kWider...>(args, shared, task, at);
  }
}

template <class T>
__device__ __forceinline__ void tiled_math(const MoeTiledArgs& args, TiledShared& shared) {
  auto& control = tiled_control<T>(shared);
  TiledRing<T::kStages> at;
  int slot = 0;
  uint32_t phase = 0;
  while (true) {
    spin_until([&] { return mbarrier_try_wait_long(&control.task_full[slot], phase); }, "moe tiled: a task", 1, 0);
    const TiledTask& task = control.task[slot];  // stays in shared memory: registers are for sums
    if (task.tile < 0) return;
    if constexpr (T::kList == TileList::kTiny)
      tiled_dispatch<T, 8, 16>(args, shared, task, at);
    else if constexpr (T::kList == TileList::kSmall)
      tiled_dispatch<T, 24, 32, 40, 48>(args, shared, task, at);
    else
      tiled_dispatch<T, 56, 64, 72, 80, 88, 96, 104, 112, 120>(args, shared, task, at);
    TiledRing<kTaskRing> next{task.slot, task.phase};
    ptx::mbarrier_arrive(&control.task_empty[next.stage]);
    next.advance();
    slot = next.stage, phase = next.phase;
  }
}

// Before the tasks of a list: every thread of the CTA, from its role. False: nothing to do. Lists are independent, a CTA goes to
// the next when this one has no more tickets.
template <class T>
__device__ __forceinline__ bool tiled_begin(const MoeTiledArgs& args) {
  if (args.routing.num_tiles[static_cast<int>(T::kList)] == 0) return false;
  fence_proxy_async_all();  // the list before read and wrote this memory in another layout
  __syncwarp();
  ptx::named_barrier_sync(0, kTiledThreads);  // everybody has left the list before
  return true;
}

template <class T>
__device__ __forceinline__ void tiled_init(TiledShared& shared) {
  auto& control = tiled_control<T>(shared);
  for (int i = 0; i < T::kStages; ++i) {
    ptx::mbarrier_init(&control.full[i], 2);                     // weights and rows
    ptx::mbarrier_init(&control.empty[i], 4 * kMathWarpgroups);  // math warps
  }
  for (int i = 0; i < kTaskRing; ++i) {
    ptx::mbarrier_init(&control.task_full[i], 1);
    ptx::mbarrier_init(&control.task_empty[i], 2 * kLoaders - 1 + 128 * kMathWarpgroups);
    ptx::mbarrier_init(&control.meta_full[i], 32);
  }
}

template <TileList kList>
__device__ __forceinline__ void tiled_load(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase,
                                           int loader) {
  using T = TiledTraits<kList>;
  if (!tiled_begin<T>(args)) return;
  if (loader >= kLoaders)
    tiled_load_rows<T>(args, shared, phase, loader - kLoaders);
  else if (loader == 0)
    tiled_schedule<T>(args, shared, phase);
  else
    tiled_load_weights<T>(args, shared, loader);
}
template <TileList kList>
__device__ __forceinline__ void tiled_compute(const MoeTiledArgs& args, TiledShared& shared) {
  using T = TiledTraits<kList>;
  if (tiled_begin<T>(args)) tiled_math<T>(args, shared);
}

static __global__ void __launch_bounds__(kTiledThreads, 1)
    moe_tiled_kernel(const __grid_constant__ MoeTiledArgs args, TiledPhase phase) {
  // No arithmetic on the base: the compiler would lose sight of its address space and use generic loads. There is no static
  // shared memory, so it stands at 1 KiB (what the system reserves); wgmma needs the alignment.
  extern __shared__ __align__(1024) uint8_t raw[];
  if (ptx::smem_address(raw) % 1024 != 0) __trap();
  TiledShared& shared = *reinterpret_cast<TiledShared*>(raw);
  if (threadIdx.x == 0) {
    tiled_init<TiledTraits<TileList::kLarge>>(shared);
    tiled_init<TiledTraits<TileList::kSmall>>(shared);
    tiled_init<TiledTraits<TileList::kTiny>>(shared);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x >= 128 * kMathWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoaderRegisters));
    const int loader = static_cast<int>(threadIdx.x / 32) - 4 * kMathWarpgroups;
    tiled_load<TileList::kLarge>(args, shared, phase, loader);
    tiled_load<TileList::kSmall>(args, shared, phase, loader);
    tiled_load<TileList::kTiny>(args, shared, phase, loader);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMathRegisters));
    tiled_compute<TileList::kLarge>(args, shared);
    tiled_compute<TileList::kSmall>(args, shared);
    tiled_compute<TileList::kTiny>(args, shared);
  }
}

}  // namespace dsv4::sm90
