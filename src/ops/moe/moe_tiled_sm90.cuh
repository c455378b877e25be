// Tiled tier of the MoE layer on Hopper: fc1 with SwiGLU and fc2 over sorted token rows, one persistent launch.
//
// Task = 4 or 8 strips of 64 weight rows x one tile of up to 120 token rows of one expert; tiles stand in three lists by size (moe_sm90.h),
// worked through one after the other, each with its own division of shared memory. Tickets of a list are drawn from a global counter,
// all of fc1 first, then fc2, which waits for the tile_done counter of its rows: tickets are handed out in order, so what a
// CTA waits for is always held by a running CTA. Warps: four math warpgroups with one strip each, or two, a warp that draws tickets
// and copies weights (never waiting for fc1), another for weights, and two that copy token rows. Weights are decoded in registers and used as the
// register operand of wgmma m64nNk16, N = the tile's rows rounded up to 8, or, to 16 rows, of mma.sync; no decoded weight is ever stored.
#pragma once

#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/ring.cuh"
#include "gpu/sm90/spin.cuh"
#include "ops/moe/moe_tiled_memory_sm90.cuh"
#include "ops/moe/moe_tiled_products_sm90.cuh"

namespace dsv4::sm90 {

// The copying warps run with all lanes and keep what they compute uniform: the copy instruction takes its operands from uniform
// registers, and is wrapped in a loop over the lanes where the compiler cannot tell (217 instructions a stage, a tenth of all).

// Weights of one stage from the slabs of the task's groups; slab, pairs: of the first group's, the second follows a row of slabs further.
template <class T>
__device__ __forceinline__ void tiled_copy_stage(uint8_t* to, const uint8_t* pairs, const TiledWork& work,
                                                 int slab_cols, int block,
                                                 const uint32_t (&words)[T::kStrips / kMoeGroupStrips],
                                                 uint64_t* full) {
  constexpr int kGroups = T::kStrips / kMoeGroupStrips, kHalves = T::kStageBlocks / 2;
  const int groups = (work.num_strips + kMoeGroupStrips - 1) / kMoeGroupStrips;
  ptx::mbarrier_arrive_expect_tx(full,
                                 work.num_strips * T::kStripCodeBytes + groups * kHalves * kMoeHalfSlabScaleBytes);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (g >= groups) break;
    const uint32_t bits = moe_chunk_bits(words[g], work.first_strip / kMoeGroupStrips + g);
    const uint8_t* pair = pairs + static_cast<int64_t>(g * slab_cols + block / kMoeSlabBlocks) * kMoeSlabPairBytes;
#pragma unroll
    for (int r = 0; r < kMoeGroupStrips; ++r) {
      const int strip = g * kMoeGroupStrips + r;
      if (strip >= work.num_strips) break;
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        ptx::bulk_load(to + strip * T::kStripCodeBytes + half * kMoeChunkBytes,
                       pair + moe_block_place(r, block + 2 * half, bits).codes, kMoeChunkBytes, full,
                       ptx::L2Hint::kEvictFirst);
    }
    ptx::bulk_load(to + T::kCodeBytes + g * kHalves * kMoeHalfSlabScaleBytes,
                   pair + moe_block_place(0, block, bits).scales, kHalves * kMoeHalfSlabScaleBytes, full,
                   ptx::L2Hint::kEvictFirst);
  }
}

// This loader's stages of one task: every kLoaders-th. One warp alone takes about 350 ns a stage, too long.
template <class T>
__device__ __forceinline__ void tiled_copy_weights(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                                   RingPosition<T::kStages>& at, int& turn, int self) {
  constexpr int kGroups = T::kStrips / kMoeGroupStrips;
  TiledWork work = tiled_work<T>(args, task);
  work.first_strip = uniform(work.first_strip), work.num_strips = uniform(work.num_strips);
  const int blocks = uniform(work.blocks), slab_cols = (blocks + kMoeSlabBlocks - 1) / kMoeSlabBlocks;
  const int64_t first_pair = task.expert * moe_slab_pairs(work.strips, blocks * kMoeBlockCols) +
                             moe_first_slab_pair(work.first_strip / kMoeGroupStrips, slab_cols);
  const uint64_t pairs = uniform(reinterpret_cast<uint64_t>(task.is_fc2 ? args.experts.fc2 : args.experts.fc1) +
                                 first_pair * kMoeSlabPairBytes);
  const uint16_t* words = task.is_fc2 ? args.experts.sides.fc2 : args.experts.sides.fc1;
  uint32_t lane_words[kGroups] = {};  // of every 32nd slab
  auto& control = tiled_control<T>(shared);
  for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance(), turn = (turn + 1) % kLoaders) {
    const int slab = block / kMoeSlabBlocks;
    if (words && block % (32 * kMoeSlabBlocks) == 0 && slab + threadIdx.x % 32 < slab_cols)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        if (g * kMoeGroupStrips < work.num_strips)
          lane_words[g] = words[first_pair + g * slab_cols + slab + threadIdx.x % 32];
    if (turn != self) continue;
    uint32_t stage_words[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) stage_words[g] = __shfl_sync(0xffffffffu, lane_words[g], slab % 32);
    spin_until([&] { return mbarrier_try_wait_long(&control.empty[at.stage], at.phase ^ 1); },
               "moe tiled: stage for weights", task.tile, block);
    if (ptx::elect_one())
      tiled_copy_stage<T>(tiled_weights<T>(shared, at.stage), reinterpret_cast<const uint8_t*>(pairs), work, slab_cols,
                          block, stage_words, &control.full[at.stage]);
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
  RingPosition<kTaskRing> task_at;
  RingPosition<T::kStages> at;
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
__device__ __forceinline__ void tiled_follow(Control& control, const RingPosition<kTaskRing>& at, int role) {
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
  RingPosition<kTaskRing> task_at;
  RingPosition<T::kStages> at;
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
  RingPosition<kTaskRing> task_at;
  RingPosition<T::kStages> at;
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

template <class T, int kN>
__device__ __forceinline__ void tiled_task(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                           RingPosition<T::kStages>& at) {
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
                                               RingPosition<T::kStages>& at) {
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
  RingPosition<T::kStages> at;
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
    RingPosition<kTaskRing> next{task.slot, task.phase};
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
