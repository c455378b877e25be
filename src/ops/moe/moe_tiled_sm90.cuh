// Tiled tier of the MoE layer on Hopper: fc1 with SwiGLU and fc2 over sorted token rows, one persistent launch.
//
// Task = 4 or 8 strips of 64 weight rows x one tile of up to 120 token rows of one expert; tiles stand in three lists by size (moe_sm90.h),
// worked through one after the other, each with its own division of shared memory. Tickets of a list are drawn from global counters, one for each
// side of the L2 on which weights lie; all of fc1 first, then fc2, which waits for the tile_done counter of its rows: who draws fc2 finds
// all of fc1 drawn, so what a CTA waits for is always held by a running CTA. CTAs are launched in pairs; in the list of large tiles a pair works on
// the same token rows (TiledPair). Warps: four math warpgroups with one strip each, or two, a warp that draws tickets and copies weights (never
// waiting for fc1), another for weights, one that copies token rows, one for what belongs to a task. Weights are decoded in registers and used as
// the register operand of wgmma m64nNk16, N = the tile's rows rounded up to 8, or, to 16 rows, of mma.sync; no decoded weight is ever stored.
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
                                                 int slab_cols, int block, const uint32_t (&words)[T::kGroups],
                                                 uint64_t* full) {
  constexpr int kHalves = T::kStageBlocks / 2;
  const int groups = (work.num_strips + kMoeGroupStrips - 1) / kMoeGroupStrips;
  ptx::mbarrier_arrive_expect_tx(full,
                                 work.num_strips * T::kStripCodeBytes + groups * kHalves * kMoeHalfSlabScaleBytes);
#pragma unroll
  for (int g = 0; g < T::kGroups; ++g) {
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
  TiledWork work = tiled_work<T>(args, task);
  work.first_strip = uniform(work.first_strip), work.num_strips = uniform(work.num_strips);
  const int blocks = uniform(work.blocks), slab_cols = (blocks + kMoeSlabBlocks - 1) / kMoeSlabBlocks;
  const int64_t first_pair = task.expert * moe_slab_pairs(work.strips, blocks * kMoeBlockCols) +
                             moe_first_slab_pair(work.first_strip / kMoeGroupStrips, slab_cols);
  const uint64_t pairs = uniform(reinterpret_cast<uint64_t>(task.is_fc2 ? args.experts.fc2 : args.experts.fc1) +
                                 first_pair * kMoeSlabPairBytes);
  const uint16_t* words = task.is_fc2 ? args.experts.sides.fc2 : args.experts.sides.fc1;
  uint32_t lane_words[T::kGroups] = {};  // of every 32nd slab
  auto& control = tiled_control<T>(shared);
  for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance(), turn = (turn + 1) % kLoaders) {
    const int slab = block / kMoeSlabBlocks;
    if (words && block % (32 * kMoeSlabBlocks) == 0 && slab + threadIdx.x % 32 < slab_cols)
#pragma unroll
      for (int g = 0; g < T::kGroups; ++g)
        if (g * kMoeGroupStrips < work.num_strips)
          lane_words[g] = words[first_pair + g * slab_cols + slab + threadIdx.x % 32];
    if (turn != self) continue;
    uint32_t stage_words[T::kGroups];
#pragma unroll
    for (int g = 0; g < T::kGroups; ++g) stage_words[g] = __shfl_sync(0xffffffffu, lane_words[g], slab % 32);
    spin_until([&] { return mbarrier_try_wait_long(&control.empty[at.stage], at.phase ^ 1); },
               "moe tiled: stage for weights", task.tile, block);
    if (ptx::elect_one())
      tiled_copy_stage<T>(tiled_weights<T>(shared, at.stage), reinterpret_cast<const uint8_t*>(pairs), work, slab_cols,
                          block, stage_words, &control.full[at.stage]);
    __syncwarp();
  }
}

// Tickets of a list: a counter for each GEMM and each side of the L2 that weights can lie on (moe_layout.h). A ticket is one task, or one of
// each CTA of a pair: then two groups of strips that are neighbours on that side.
struct TiledQueue {
  int index;  // of the counter: 2 for fc2, + side
  int per_tile, tickets;
};
template <class T>
__device__ __forceinline__ TiledQueue tiled_queue(const MoeTiledArgs& args, const TiledPair& pair, int index) {
  const int64_t strips = index & 2 ? moe_fc2_strips(args.shape.hidden) : moe_fc1_strips(args.shape.inter);
  const int per_ticket = T::kGroups * pair.ctas;
  const int per_tile = (moe_groups_of_side(moe_groups(strips), index & 1) + per_ticket - 1) / per_ticket;
  return {index, per_tile, per_tile * args.routing.num_tiles[static_cast<int>(T::kList)]};
}

// Draws a CTA's tickets, or those of its pair: of fc1 the ones of its own side of the L2, then the other's, then the same of fc2; of fc2 none before
// all of fc1 are drawn.
template <class T>
class TiledTickets {
 public:
  __device__ __forceinline__ TiledTickets(const MoeTiledArgs& args, const TiledPair& pair, TiledPhase phase)
      : args_(args),
        pair_(pair),
        side_(args.experts.sides.sms.side(ptx::smid())),
        turn_(phase == TiledPhase::kFc2 ? 2 : 0),
        turns_(phase == TiledPhase::kFc1 ? 2 : 4) {
    draw();
  }
  // Early, so that its latency hides behind a task.
  __device__ __forceinline__ void draw() {
    if (pair_.rank == 0 && threadIdx.x % 32 == 0)
      drawn_ = atomicAdd(&args_.routing.ticket[4 * static_cast<int>(T::kList) + index()], 1u);
  }
  // What was drawn: ticket * 4 + queue; -1: no more.
  __device__ __forceinline__ int take() {
    while (true) {
      const int ticket = static_cast<int>(uniform(drawn_));
      if (ticket < tiled_queue<T>(args_, pair_, index()).tickets) return ticket * 4 + index();
      if (++turn_ == turns_) return -1;
      draw();
    }
  }

 private:
  __device__ __forceinline__ int index() const { return (turn_ & 2) | (side_ ^ (turn_ & 1)); }
  const MoeTiledArgs& args_;
  const TiledPair pair_;
  const int side_;
  int turn_, turns_;
  uint32_t drawn_ = 0;
};

// The same in the CTA of a pair that does not draw: the ticket that its peer sends.
template <class T>
__device__ __forceinline__ int tiled_receive(TiledShared& shared, const RingPosition<kTaskRing>& at) {
  auto& control = tiled_control<T>(shared);
  uint64_t* full = &control.ticket_full[at.stage];
  int ticket = 0;
  const bool first_lane = threadIdx.x % 32 == 0;
  if (first_lane) ptx::mbarrier_arrive_expect_tx(full, sizeof control.ticket[0]);
  spin_until([&] { return ptx::mbarrier_try_wait_cluster(full, at.phase); }, "moe tiled: ticket", 0, 0);
  if (first_lane) {
    ticket = control.ticket[at.stage];
    ptx::mbarrier_arrive_cluster(
        ptx::map_to_cta(&control.task_empty[at.stage], 0));  // its place is free with the task's
  }
  return uniform(ticket);
}

// Draws tickets, tells the other roles and the peer, and copies weights as loader 0.
template <class T>
__device__ __forceinline__ void tiled_schedule(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase) {
  const int lane = threadIdx.x % 32;
  const TiledPair pair = tiled_pair<T>();
  TiledTickets<T> tickets(args, pair, phase);
  auto& control = tiled_control<T>(shared);
  RingPosition<kTaskRing> task_at;
  RingPosition<T::kStages> at;
  int turn = 0;
  while (true) {
    spin_until([&] { return mbarrier_try_wait_long(&control.task_empty[task_at.stage], task_at.phase ^ 1); },
               "moe tiled: task slot", task_at.stage, 0);
    const int ticket = pair.rank == 0 ? tickets.take() : tiled_receive<T>(shared, task_at);
    if (T::kPaired && pair.rank == 0 && pair.ctas > 1 && lane == 0)
      ptx::store_async_cluster_s32(ptx::map_to_cta(&control.ticket[task_at.stage], pair.peer()), ticket,
                                   ptx::map_to_cta(&control.ticket_full[task_at.stage], pair.peer()));
    TiledTask task{};
    task.tile = -1;
    task.slot = task_at.stage, task.phase = task_at.phase;
    if (ticket >= 0) {
      const TiledQueue queue = tiled_queue<T>(args, pair, ticket & 3);
      task.is_fc2 = queue.index >> 1;
      task.tile = (ticket >> 2) / queue.per_tile;
      const int in_tile = (ticket >> 2) - task.tile * queue.per_tile;
      const int group = moe_group_of_side(queue.index & 1, in_tile * T::kGroups * pair.ctas) + T::kGroups * pair.rank;
      task.first_strip = group * kMoeGroupStrips;
      const MoeTile tile = args.routing.tiles[static_cast<int>(T::kList) * args.routing.max_tiles + task.tile];
      task.expert = tile.expert, task.first_row = tile.first_row, task.rows = tile.rows, task.padded = tile.padded;
    }
    if (lane == 0) {
      control.task[task_at.stage] = task;
      ptx::mbarrier_arrive(&control.task_full[task_at.stage]);
    }
    __syncwarp();
    task_at.advance();
    if (task.tile < 0) return;
    tickets.draw();
    tiled_copy_weights<T>(args, shared, task, at, turn, 0);
  }
}

// For a task, in the warps that copy but do not draw tickets. The second wait is over before it begins, because who wrote the task has waited
// for the same; it lets racecheck see that the readers of what is overwritten next are done.
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
  auto& control = tiled_control<T>(shared);
  RingPosition<kTaskRing> task_at;
  RingPosition<T::kStages> at;
  int turn = 0;
  while (true) {
    tiled_follow(control, task_at, 2);
    const TiledTask task = control.task[task_at.stage];
    ptx::mbarrier_arrive(&control.task_empty[task_at.stage]);
    task_at.advance();
    if (task.tile < 0) return;
    tiled_copy_weights<T>(args, shared, task, at, turn, self);
  }
}

// Copies token rows; of a pair's, every second block of a stage, to both CTAs.
template <class T>
__device__ __forceinline__ void tiled_load_rows(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase) {
  auto& control = tiled_control<T>(shared);
  RingPosition<kTaskRing> task_at;
  RingPosition<T::kStages> at;
  const uint32_t strips1 = static_cast<uint32_t>(moe_fc1_strips(args.shape.inter));
  const TiledPair pair = tiled_pair<T>();
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
    for (int block = 0; block < blocks; block += T::kStageBlocks, at.advance()) {
      spin_until([&] { return mbarrier_try_wait_long(&control.empty[at.stage], at.phase ^ 1); },
                 "moe tiled: stage for rows", task.tile, block);
      if (T::kPaired && pair.ctas > 1)
        spin_until([&] { return mbarrier_try_wait_long(&control.peer_empty[at.stage], at.phase ^ 1); },
                   "moe tiled: the peer's stage for rows", task.tile, block);
      if (ptx::elect_one()) {
        uint64_t* full = &control.full[at.stage];
        ptx::mbarrier_arrive_expect_tx(full, T::kStageBlocks * bytes);
        const uint8_t* from = reinterpret_cast<const uint8_t*>(source) + static_cast<int64_t>(block) * bytes;
        uint8_t* to = tiled_rows<T>(shared, at.stage);
#pragma unroll
        for (int i = 0; i < T::kStageBlocks; ++i) {
          const uint8_t* source = from + (block + i < blocks ? i * bytes : 0);  // one that the task lacks meets zeros
          if constexpr (!T::kPaired)
            ptx::bulk_load(to + i * T::kBlockPitch, source, bytes, full);
          else if (i % pair.ctas == pair.rank)
            ptx::bulk_load_multicast(to + i * T::kBlockPitch, source, bytes, full, (1u << pair.ctas) - 1);
        }
      }
      __syncwarp();
    }
    ptx::mbarrier_arrive(&control.task_empty[task_at.stage]);
    task_at.advance();
  }
}

// Brings what the epilogue wants to know of a task's rows, and tells other CTAs that h is written: a release waits until all earlier stores have
// arrived, more than a microsecond, which no math warp should.
template <class T>
__device__ __forceinline__ void tiled_keep(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase) {
  const int lane = threadIdx.x % 32;
  auto& control = tiled_control<T>(shared);
  RingPosition<kTaskRing> at;
  while (true) {
    tiled_follow(control, at, 1);
    const TiledTask task = control.task[at.stage];
    if (task.tile < 0) return;
    for (int row = lane; row < task.padded; row += 32) {
      const int slot = row < task.rows ? args.routing.row_slot[task.first_row + row] : -1;
      control.slot[at.stage][row] = slot;
      control.rho[at.stage][row] = slot >= 0 ? args.topk_weights[slot] : 0.0f;  // padding: rows of whatever memory held
    }
    if (lane < 3) control.alpha[at.stage][lane] = args.experts.alpha[task.expert * 3 + lane] * kMoeAlphaScale;
    ptx::mbarrier_arrive(&control.meta_full[at.stage]);
    ptx::mbarrier_arrive(&control.task_empty[at.stage]);
    if (!task.is_fc2 && phase == TiledPhase::kBoth) {
      spin_until([&] { return mbarrier_try_wait_long(&control.task_done[at.stage], at.phase); },
                 "moe tiled: h of this CTA", task.tile, 0);
      if (lane == 0) {
        fence_proxy_async_all();  // h: ordinary stores here, copy engine there
        add_release(&tiled_done<T>(args, task), tiled_work<T>(args, task).num_strips);
      }
      __syncwarp();
    }
    at.advance();
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
    if (task.is_fc2 && args.h_global)
      tiled_finish_fc2<kN, true>(args, task, control.slot[slot], control.alpha[slot][2], strip, sum[s], warp, lane);
    else if (task.is_fc2)
      tiled_finish_fc2<kN, false>(args, task, control.slot[slot], control.alpha[slot][2], strip, sum[s], warp, lane);
    else if (args.h_wide)
      tiled_finish_fc1_wide<kN>(args, task, control.rho[slot], control.alpha[slot], strip, sum[s], warp, lane);
    else
      tiled_finish_fc1<kN>(args, task, control.rho[slot], control.alpha[slot], strip, sum[s], warp, lane);
  }
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&control.task_done[slot]);
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
__device__ __forceinline__ void tiled_math(const MoeTiledArgs& args, TiledShared& raw_shared) {
  // One register for the base, from here to the end: the compiler would keep several, made from the CTA's place in its cluster.
  TiledShared& shared = *static_cast<TiledShared*>(__cvta_shared_to_generic(opaque(ptx::smem_address(&raw_shared))));
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
  const TiledPair pair = tiled_pair<T>();
  for (int i = 0; i < T::kStages; ++i) {
    ptx::mbarrier_init(&control.full[i], 2);                 // weights and rows
    ptx::mbarrier_init(&control.empty[i], 32 * kMathWarps);  // every lane that reads: racecheck follows no other
    ptx::mbarrier_init(&control.peer_empty[i], kMathWarps);
  }
  for (int i = 0; i < kTaskRing; ++i) {
    ptx::mbarrier_init(&control.task_full[i], 1);
    ptx::mbarrier_init(&control.task_empty[i], 32 * (kLoaders + 1 + kMathWarps) + (pair.ctas - 1 - pair.rank));
    ptx::mbarrier_init(&control.task_done[i], kMathWarps);
    ptx::mbarrier_init(&control.ticket_full[i], 1);
    ptx::mbarrier_init(&control.meta_full[i], 32);
  }
}

template <TileList kList>
__device__ __forceinline__ void tiled_load(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase, int warp) {
  using T = TiledTraits<kList>;
  if (!tiled_begin<T>(args)) return;
  if (warp == 0)
    tiled_schedule<T>(args, shared, phase);
  else if (warp < kLoaders)
    tiled_load_weights<T>(args, shared, warp);
  else if (warp == kLoaders)
    tiled_load_rows<T>(args, shared, phase);
  else
    tiled_keep<T>(args, shared, phase);
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
  ptx::cluster_sync();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x >= 128 * kMathWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoaderRegisters));
    const int warp = static_cast<int>(threadIdx.x / 32) - kMathWarps;
    tiled_load<TileList::kLarge>(args, shared, phase, warp);
    tiled_load<TileList::kSmall>(args, shared, phase, warp);
    tiled_load<TileList::kTiny>(args, shared, phase, warp);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMathRegisters));
    tiled_compute<TileList::kLarge>(args, shared);
    tiled_compute<TileList::kSmall>(args, shared);
    tiled_compute<TileList::kTiny>(args, shared);
  }
  __syncwarp();
  ptx::cluster_sync();  // until then the peer may write here
}

}  // namespace dsv4::sm90
