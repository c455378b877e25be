// Tiled tier of the MoE layer on Hopper: fc1 with SwiGLU and fc2 over sorted token rows, one persistent launch.
//
// Task = 256 weight rows (4 strips) x one tile of up to 128 token rows of one expert; tickets are drawn from a global counter,
// all of fc1 first, then fc2, which waits for the tile_done counter of its rows: tickets are handed out in order, so what a
// CTA waits for is always held by a running CTA. Warps: two math warpgroups with two strips each, a warp that draws tickets
// and copies weights (never waiting for fc1), and one that copies token rows. Weights are decoded in registers and used as the
// register operand of wgmma m64nNk16, N = the tile's rows rounded up to 8; no decoded weight is ever stored.
#pragma once

#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/spin.cuh"
#include "gpu/sm90/wgmma_rs.cuh"
#include "ops/moe/moe_decode_sm90.cuh"
#include "ops/moe/moe_sm90.h"
#include "ops/moe/swiglu.h"

namespace dsv4::sm90 {

struct TiledTraits {
  static constexpr int kMathWarpgroups = 2, kStripsPerGroup = 2;
  static constexpr int kStrips = kMathWarpgroups * kStripsPerGroup;  // 256 weight rows a task
  static constexpr int kThreads = 128 * (kMathWarpgroups + 1);
  static constexpr int kMathRegisters = 224, kOtherRegisters = 56;
  static constexpr int kStageBlocks = 2;                             // K128
  static constexpr int kStripStageBytes = kStageBlocks * kMoeBlockBytes;
  static constexpr int kWeightBytes = kStrips * kStripStageBytes;
  static constexpr int kRowBytes = kTileRows * 128 * kStageBlocks;
  static constexpr int kStages = 4;
  static constexpr int kTaskRing = 2;

  struct Task {
    int tile, block;  // tile < 0: no more tasks
    int is_fc2;
    int expert, first_row, rows, padded;
  };
  struct Shared {
    alignas(1024) uint8_t rows[kStages][kRowBytes];
    alignas(128) uint8_t weights[kStages][kWeightBytes];
    uint64_t full[kStages], empty[kStages];
    Task task[kTaskRing];
    uint64_t task_full[kTaskRing], task_empty[kTaskRing];
  };
  static constexpr int kSmemBytes = sizeof(Shared) + 1024;  // the runtime aligns to 16 only
  static_assert(kSmemBytes <= 227 * 1024);
};

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
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return encode_bf16(low).bits | static_cast<uint32_t>(encode_bf16(high).bits) << 16;
}

using TiledShared = TiledTraits::Shared;
using TiledTask = TiledTraits::Task;

struct TiledWork {  // what all roles derive from a task
  int blocks, strips, first_strip, num_strips;
  const uint8_t* weights;
};
__device__ __forceinline__ TiledWork tiled_work(const MoeTiledArgs& args, const TiledTask& task) {
  TiledWork work;
  work.blocks = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  work.strips = static_cast<int>(task.is_fc2 ? moe_fc2_strips(args.shape.hidden) : moe_fc1_strips(args.shape.inter));
  work.first_strip = task.block * TiledTraits::kStrips;
  work.num_strips = min(TiledTraits::kStrips, work.strips - work.first_strip);
  work.weights = (task.is_fc2 ? args.experts.fc2 : args.experts.fc1) +
                 (static_cast<int64_t>(task.expert) * work.strips + work.first_strip) * work.blocks * kMoeBlockBytes;
  return work;
}

// Next task for a role; every reader of the ring arrives once (a warp: its lane 0).
template <bool kWarp>
__device__ __forceinline__ TiledTask tiled_next(TiledShared& shared, TiledRing<TiledTraits::kTaskRing>& at) {
  spin_until([&] { return ptx::mbarrier_try_wait(&shared.task_full[at.stage], at.phase); }, "moe tiled: a task", 0, 0);
  const TiledTask task = shared.task[at.stage];
  if constexpr (kWarp) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.task_empty[at.stage]);
  } else {
    ptx::mbarrier_arrive(&shared.task_empty[at.stage]);
  }
  at.advance();
  return task;
}

// Draws tickets, tells the other roles, and copies the weights.
__device__ __forceinline__ void tiled_load_weights(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase) {
  using T = TiledTraits;
  const int blocks1 = (static_cast<int>(moe_fc1_strips(args.shape.inter)) + T::kStrips - 1) / T::kStrips;
  const int blocks2 = (static_cast<int>(moe_fc2_strips(args.shape.hidden)) + T::kStrips - 1) / T::kStrips;
  const int tiles = *args.routing.num_tiles;
  const int tasks1 = phase == TiledPhase::kFc2 ? 0 : tiles * blocks1, tasks = tasks1 + (phase == TiledPhase::kFc1 ? 0 : tiles * blocks2);
  uint32_t* ticket = &args.routing.ticket[phase == TiledPhase::kFc2 ? 1 : 0];
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  int v = static_cast<int>(atomicAdd(ticket, 1u));
  while (true) {
    TiledTask task{};
    task.tile = -1;
    if (v < tasks) {
      task.is_fc2 = v >= tasks1;
      const int w = task.is_fc2 ? v - tasks1 : v, blocks = task.is_fc2 ? blocks2 : blocks1;
      task.tile = w / blocks;
      task.block = w - task.tile * blocks;
      const MoeTile tile = args.routing.tiles[task.tile];
      task.expert = tile.expert, task.first_row = tile.first_row, task.rows = tile.rows, task.padded = tile.padded;
    }
    spin_until([&] { return ptx::mbarrier_try_wait(&shared.task_empty[task_at.stage], task_at.phase ^ 1); }, "moe tiled: task slot", v, 0);
    shared.task[task_at.stage] = task;
    ptx::mbarrier_arrive(&shared.task_full[task_at.stage]);
    task_at.advance();
    if (task.tile < 0) return;
    v = static_cast<int>(atomicAdd(ticket, 1u));  // early: its latency hides behind this task
    const TiledWork work = tiled_work(args, task);
    for (int block = 0; block < work.blocks; block += T::kStageBlocks) {
      const uint32_t bytes = min(T::kStageBlocks, work.blocks - block) * kMoeBlockBytes;
      spin_until([&] { return ptx::mbarrier_try_wait(&shared.empty[at.stage], at.phase ^ 1); }, "moe tiled: stage for weights", task.tile, block);
      ptx::mbarrier_arrive_expect_tx(&shared.full[at.stage], bytes * work.num_strips);
      for (int strip = 0; strip < work.num_strips; ++strip)
        ptx::bulk_load(&shared.weights[at.stage][strip * T::kStripStageBytes],
                       work.weights + (static_cast<int64_t>(strip) * work.blocks + block) * kMoeBlockBytes, bytes, &shared.full[at.stage],
                       ptx::L2Hint::kEvictFirst);
      at.advance();
    }
  }
}

__device__ __forceinline__ void tiled_load_rows(const MoeTiledArgs& args, TiledShared& shared, TiledPhase phase) {
  using T = TiledTraits;
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  const uint32_t blocks1 = (static_cast<uint32_t>(moe_fc1_strips(args.shape.inter)) + T::kStrips - 1) / T::kStrips;
  for (TiledTask task = tiled_next<false>(shared, task_at); task.tile >= 0; task = tiled_next<false>(shared, task_at)) {
    const TiledWork work = tiled_work(args, task);
    const bf16* operand = task.is_fc2 ? args.h_rows : args.x_rows;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(operand) + static_cast<int64_t>(task.first_row) * work.blocks * 128;
    if (task.is_fc2 && phase == TiledPhase::kBoth) {
      spin_until([&] { return load_acquire(&args.routing.tile_done[task.tile]) >= blocks1; }, "moe tiled: h of a tile", task.tile, blocks1);
      fence_proxy_async_all();
    }
    for (int block = 0; block < work.blocks; block += T::kStageBlocks) {
      const uint32_t bytes = min(T::kStageBlocks, work.blocks - block) * task.padded * 128;
      spin_until([&] { return ptx::mbarrier_try_wait(&shared.empty[at.stage], at.phase ^ 1); }, "moe tiled: stage for rows", task.tile, block);
      ptx::mbarrier_arrive_expect_tx(&shared.full[at.stage], bytes);
      ptx::bulk_load(shared.rows[at.stage], source + static_cast<int64_t>(block) * task.padded * 128, bytes, &shared.full[at.stage]);
      at.advance();
    }
  }
}

// fc1: two gate/up values per token pair -> h in operand order.
template <int kN>
__device__ __forceinline__ void tiled_finish_fc1(const MoeTiledArgs& args, const TiledTask& task, int strip, const float (&sum)[kN / 2],
                                                 int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float alpha_gate = args.experts.alpha[task.expert * 3] * kMoeAlphaScale;
  const float alpha_up = args.experts.alpha[task.expert * 3 + 1] * kMoeAlphaScale;
  const int chunk = (strip & 1) * 4 + warp;
  uint8_t* target = reinterpret_cast<uint8_t*>(args.h_rows) + static_cast<int64_t>(task.first_row) * args.shape.inter * 2 +
                    static_cast<int64_t>(strip >> 1) * task.padded * 128 + g * 128 + ((chunk ^ g) << 4) + t * 4;
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    float h[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile * 8 + 2 * t + i;
      const int padded_row = task.first_row + min(row, task.rows - 1);
      float gate_alpha = alpha_gate, up_alpha = alpha_up;
      if (args.x_global) {
        const float global = args.x_global[padded_row];
        gate_alpha = alpha_gate * global, up_alpha = alpha_up * global;
      }
      const float rho = args.topk_weights[args.routing.row_slot[padded_row]];
      h[i] = swiglu(round_bf16(sum[tile * 4 + i] * gate_alpha), round_bf16(sum[tile * 4 + 2 + i] * up_alpha), rho, args.swiglu_limit);
      if (args.h_wide && row < task.rows)
        args.h_wide[static_cast<int64_t>(padded_row) * args.shape.inter + moe_fc1_row(strip, warp, g)] = h[i];
    }
    if (!args.h_wide) *reinterpret_cast<uint32_t*>(target + tile * 1024) = transpose_8x8(pack_bf16(h[0], h[1]));
  }
}

template <int kN>
__device__ __forceinline__ void tiled_finish_fc2(const MoeTiledArgs& args, const TiledTask& task, int strip, const float (&sum)[kN / 2],
                                                 int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float alpha = args.experts.alpha[task.expert * 3 + 2] * kMoeAlphaScale;
  bf16* target = args.slot_y + strip * 64 + warp * 16 + 4 * t;
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
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
      *reinterpret_cast<uint2*>(target + static_cast<int64_t>(args.routing.row_slot[task.first_row + row]) * args.shape.hidden) =
          make_uint2(low, high);
  }
}

template <int kN>
__device__ __forceinline__ void tiled_task(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task, const TiledWork& work,
                                           TiledRing<TiledTraits::kStages>& at) {
  using T = TiledTraits;
  int tid;  // volatile: keeps addresses of 16 instances from being hoisted, which costs registers and serialises wgmma
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
  const int group = tid / 128, warp = (tid / 32) % 4, lane = tid % 32, thread = tid % 128;
  float sum[2][kN / 2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sum[m][i] = 0.0f;
  uint32_t a[2][4][4];
  int previous = -1;
  for (int block = 0; block < work.blocks; block += T::kStageBlocks) {
    spin_until([&] { return ptx::mbarrier_try_wait(&shared.full[at.stage], at.phase); }, "moe tiled: stage filled", task.tile, block);
    const uint32_t weights = ptx::smem_address(shared.weights[at.stage]) + group * 2 * T::kStripStageBytes;
    const uint64_t rows = wgmma_descriptor(ptx::smem_address(shared.rows[at.stage]));
#pragma unroll
    for (int k = 0; k < T::kStageBlocks; ++k) {
      if (k < work.blocks - block) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint4 codes;
          const uint32_t base = weights + m * T::kStripStageBytes + k * kMoeBlockBytes;
          load_shared_16(codes, base + thread * 16);
          const uint32_t scales = load_shared_u16(base + kMoeBlockCodeBytes + thread * 2);
          decode_block(codes, scales, a[m]);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step) Wgmma<kN>::mma(sum[m], a[m][step], rows + (k * kN * 128 + step * 32) / 16);
          wgmma_commit();
          wgmma_wait<1>();  // the other strip's step is done: its fragments may be rewritten
          if (k == 0 && m == 0 && previous >= 0) {
            if (lane == 0) ptx::mbarrier_arrive(&shared.empty[previous]);
          }
        }
      }
    }
    previous = at.stage;
    at.advance();
  }
  wgmma_wait<0>();
  if (lane == 0) ptx::mbarrier_arrive(&shared.empty[previous]);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int local = group * 2 + m;
    if (local < work.num_strips) {
      if (task.is_fc2)
        tiled_finish_fc2<kN>(args, task, work.first_strip + local, sum[m], warp, lane);
      else
        tiled_finish_fc1<kN>(args, task, work.first_strip + local, sum[m], warp, lane);
    }
  }
}

__device__ __forceinline__ void tiled_math(const MoeTiledArgs& args, TiledShared& shared) {
  using T = TiledTraits;
  TiledRing<T::kTaskRing> task_at;
  TiledRing<T::kStages> at;
  for (TiledTask task = tiled_next<true>(shared, task_at); task.tile >= 0; task = tiled_next<true>(shared, task_at)) {
    const TiledWork work = tiled_work(args, task);
    // Compared one by one through an opaque copy: a jump table makes ptxas serialise every wgmma of the kernel (C7512).
    const auto rows_are = [&](int rows) {
      int n;
      asm volatile("mov.u32 %0, %1;" : "=r"(n) : "r"(task.padded));
      return n == rows;
    };
    if (false) {
    }
#define DSV4_MOE_TILE(n) else if (rows_are(8 * n)) tiled_task<8 * n>(args, shared, task, work, at);
      DSV4_MOE_TILE(1) DSV4_MOE_TILE(2) DSV4_MOE_TILE(3) DSV4_MOE_TILE(4) DSV4_MOE_TILE(5) DSV4_MOE_TILE(6) DSV4_MOE_TILE(7)
      DSV4_MOE_TILE(8) DSV4_MOE_TILE(9) DSV4_MOE_TILE(10) DSV4_MOE_TILE(11) DSV4_MOE_TILE(12) DSV4_MOE_TILE(13) DSV4_MOE_TILE(14)
      DSV4_MOE_TILE(15) DSV4_MOE_TILE(16)
#undef DSV4_MOE_TILE
    if (!task.is_fc2) {
      fence_proxy_async_all();  // h: ordinary stores here, copy engine there
      ptx::named_barrier_sync(1, 128 * T::kMathWarpgroups);
      if (threadIdx.x == 0) add_release(&args.routing.tile_done[task.tile], 1);
    }
  }
}

template <int kUnused = 0>
__global__ void __launch_bounds__(TiledTraits::kThreads, 1)
    moe_tiled_kernel(const __grid_constant__ MoeTiledArgs args, TiledPhase phase) {
  using T = TiledTraits;
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<TiledShared*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 2);                       // weights and rows
      ptx::mbarrier_init(&shared.empty[i], 4 * T::kMathWarpgroups);  // math warps
    }
    for (int i = 0; i < T::kTaskRing; ++i) {
      ptx::mbarrier_init(&shared.task_full[i], 1);
      ptx::mbarrier_init(&shared.task_empty[i], 1 + 4 * T::kMathWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x >= 128 * T::kMathWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(T::kOtherRegisters));
    if (threadIdx.x == 128 * T::kMathWarpgroups) tiled_load_weights(args, shared, phase);
    if (threadIdx.x == 128 * T::kMathWarpgroups + 32) tiled_load_rows(args, shared, phase);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kMathRegisters));
    tiled_math(args, shared);
  }
}

}  // namespace dsv4::sm90
