// Ring tier of the MoE layer on Hopper: one launch like the streaming tier (moe_stream_sm90.cuh), for one to three tokens, where
// that one has too few tasks to fill the machine.
//
// Task = 64 weight rows x up to 8 token rows of one expert. Two warps copy packed strips in task order (all of fc1,
// then all of fc2) into a ring while two warps bring the token rows, which do wait (fc2's for the h of their chunk). Groups
// of four math warps take ring stages in turn (split-K inside the CTA); four more warps add their sums in a fixed order and run the
// epilogue. The last task of a strip combines.
//
// A launch is short, so its ends count: up to 32 slots are routed in the registers of the warps that copy weights, the counters are put back by
// warps that have nothing else left to do, and a stage costs a copying warp three shuffles for its four addresses (these share their
// schedulers with decoding warps and bounded the kernel before).
//
// Tasks alternate between the sides of the L2, and so do CTAs: a CTA's tasks lie on its SM's side (ring_first_task), where the number of CTAs
// is even and strips are a multiple of 16.
//
// kShared: the FP8 shared expert's tasks are tasks of this launch. A half block stands where a block of a routed expert does.
#pragma once

#include "ops/moe/moe_ring_memory_sm90.cuh"

namespace dsv4::sm90 {

// What a warp needs of one block: 16 weight rows, 8 token rows.
struct RingOperands {
  uint4 codes, rows[2];
  uint32_t scales;
};
template <class Traits>
__device__ __forceinline__ void ring_fetch(RingOperands& o, uint32_t stage_address, int block, int warp, int lane) {
  const uint32_t thread = warp * 32 + lane;
  const uint32_t rows =
      stage_address + Traits::kWeightBytes + (lane >> 2) * Traits::kRowPitch + (lane & 3) * 32 + block * 128;
  load_shared_16(o.codes, stage_address + block * kMoeBlockCodeBytes + thread * 16);
  o.scales =
      load_shared_u16(stage_address + Traits::kScalesAt + block / 2 * kMoePairScaleBytes + thread * 4 + block % 2 * 2);
  load_shared_16(o.rows[0], rows);
  load_shared_16(o.rows[1], rows + 16);
}
__device__ __forceinline__ void ring_multiply(const RingOperands& o, float (&sum)[2][4]) {
  uint32_t a[2][2][4];
  decode_block(o.codes, o.scales, a);
  ptx::mma_m16n8k16_bf16(sum[0], a[0][0], o.rows[0].x, o.rows[0].y);  // two sums: half the dependent chain
  ptx::mma_m16n8k16_bf16(sum[1], a[0][1], o.rows[0].z, o.rows[0].w);
  ptx::mma_m16n8k16_bf16(sum[0], a[1][0], o.rows[1].x, o.rows[1].y);
  ptx::mma_m16n8k16_bf16(sum[1], a[1][1], o.rows[1].z, o.rows[1].w);
}
// The same of half a block of the shared expert.
template <class Traits>
__device__ __forceinline__ void ring_fetch_fp8(RingOperands& o, uint32_t stage_address, int half, int warp, int lane) {
  const uint32_t weights = stage_address + half * kMoeFp8HalfBytes;
  load_shared_16(o.codes, weights + (warp * 32 + lane) * 16);
  o.scales = load_shared_u16(weights + kMoeBlockCodeBytes);
  load_shared_16(o.rows[0], stage_address + Traits::kWeightBytes + (lane >> 2) * Traits::kRowPitch + (lane & 3) * 32 +
                                half / 2 * 128 + half % 2 * 16);
}
__device__ __forceinline__ void ring_multiply_fp8(const RingOperands& o, float (&sum)[2][4]) {
  uint32_t a[2][4];
  decode_fp8_half_block(o.codes, o.scales, a);
  ptx::mma_m16n8k16_bf16(sum[0], a[0], o.rows[0].x, o.rows[0].y);
  ptx::mma_m16n8k16_bf16(sum[1], a[1], o.rows[0].z, o.rows[0].w);
}
template <class Traits>
__device__ __forceinline__ void ring_stage_fp8(uint32_t stage_address, int halves, int warp, int lane,
                                               float (&sum)[2][4]) {
  RingOperands o[2];  // an even number of halves: both of a block
#pragma unroll
  for (int half = 0; half < Traits::kStageBlocks; half += 2) {
    if (half >= halves) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) ring_fetch_fp8<Traits>(o[i], stage_address, half + i, warp, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) ring_multiply_fp8(o[i], sum);
  }
}
// One ring stage of one warp. The next block's operands are fetched before a block is decoded.
template <class Traits>
__device__ __forceinline__ void ring_stage(uint32_t stage_address, int blocks, int warp, int lane, float (&sum)[2][4]) {
  RingOperands o[2];
  if (blocks >= Traits::kStageBlocks) {
    ring_fetch<Traits>(o[0], stage_address, 0, warp, lane);
#pragma unroll
    for (int block = 0; block < Traits::kStageBlocks; ++block) {
      if (block + 1 < Traits::kStageBlocks)
        ring_fetch<Traits>(o[(block + 1) % 2], stage_address, block + 1, warp, lane);
      ring_multiply(o[block % 2], sum);
    }
  } else {
#pragma unroll 1
    for (int block = 0; block < min(blocks, Traits::kStageBlocks); ++block) {
      ring_fetch<Traits>(o[0], stage_address, block, warp, lane);
      ring_multiply(o[0], sum);
    }
  }
}

// The sums of one task's stages that belong to this group, left in shared.partial for the group that finishes the task.
template <class Traits>
__device__ __forceinline__ void ring_task_sums(uint8_t* ring, uint64_t* full, uint64_t* empty, const RingTask& task,
                                               int group, int warp, int lane, int first_stage, float* partial,
                                               uint64_t* partial_empty, uint32_t partial_phase) {
  float sum[2][4] = {};
  const int stages = (task.blocks + Traits::kStageBlocks - 1) / Traits::kStageBlocks;
  for (int i = (group + Traits::kGroups - first_stage % Traits::kGroups) % Traits::kGroups; i < stages;
       i += Traits::kGroups) {
    const uint32_t at = static_cast<uint32_t>(first_stage + i), stage = at % Traits::kStages,
                   phase = at / Traits::kStages & 1;
    spin_until([&] { return mbarrier_try_wait_long(&full[stage], phase); }, "moe ring: stage filled", task.counter, i);
    const uint32_t stage_address = ptx::smem_address(ring + stage * Traits::kStageBytes);
    const int blocks = task.blocks - i * Traits::kStageBlocks;
    if constexpr (Traits::kMode != StreamMode::kWeightsOnly) {
      if (Traits::kShared && task.is_shared)
        ring_stage_fp8<Traits>(stage_address, blocks, warp, lane, sum);
      else
        ring_stage<Traits>(stage_address, blocks, warp, lane, sum);
    }
    ptx::mbarrier_arrive(
        &empty[stage]);  // of every lane that has read: racecheck does not follow a __syncwarp and one arrival
  }
  spin_until([&] { return mbarrier_try_wait_long(partial_empty, partial_phase ^ 1); }, "moe ring: partial sums free",
             task.counter, 0);
  *reinterpret_cast<float4*>(partial + (group * 4 + warp) * 128 + lane * 4) =
      make_float4(sum[0][0] + sum[1][0], sum[0][1] + sum[1][1], sum[0][2] + sum[1][2], sum[0][3] + sum[1][3]);
}

// y of 64 output columns for every token: the slots' outputs added in order of expert id.
template <class Traits>
__device__ __forceinline__ void ring_combine(const MoeStreamArgs& args, const typename Traits::Shared& shared,
                                             int strip, int thread) {
  const int lane = thread & 15, hidden = args.shape.hidden, topk = args.shape.num_topk;
  for (int token = thread >> 4; token < args.num_tokens; token += 8) {
    float sum[4] = {};
    const int64_t column = strip * 64 + lane * 4;
#pragma unroll 6
    for (int k = 0; k < topk; ++k) {
      const int place = shared.routing.order[token * topk + k];
      if (place == 0xff) continue;
      const uint2 v = __ldcg(
          reinterpret_cast<const uint2*>(args.slot_y + static_cast<int64_t>(token * topk + place) * hidden + column));
      sum[0] += __uint_as_float(v.x << 16);
      sum[1] += __uint_as_float(v.x & 0xffff0000u);
      sum[2] += __uint_as_float(v.y << 16);
      sum[3] += __uint_as_float(v.y & 0xffff0000u);
    }
    if (args.shared_y) {
      const uint2 v =
          __ldcg(reinterpret_cast<const uint2*>(args.shared_y + static_cast<int64_t>(token) * hidden + column));
      sum[0] += __uint_as_float(v.x << 16);
      sum[1] += __uint_as_float(v.x & 0xffff0000u);
      sum[2] += __uint_as_float(v.y << 16);
      sum[3] += __uint_as_float(v.y & 0xffff0000u);
    }
    const uint2 out = make_uint2(encode_bf16(sum[0]).bits | uint32_t(encode_bf16(sum[1]).bits) << 16,
                                 encode_bf16(sum[2]).bits | uint32_t(encode_bf16(sum[3]).bits) << 16);
    *reinterpret_cast<uint2*>(args.y + static_cast<int64_t>(token) * hidden + column) = out;
  }
}

// Adds the groups' partial sums of a task and finishes it: h of fc1, slot outputs of fc2, y where the strip is complete.
template <class Traits>
__device__ __forceinline__ void ring_epilogue(const MoeStreamArgs& args, typename Traits::Shared& shared,
                                              const RingTasks& tasks, const RingTask& task, const float* partial,
                                              uint64_t* partial_full, uint64_t* partial_empty, uint32_t phase, int warp,
                                              int lane) {
  const bool is_shared = Traits::kShared && task.is_shared;
  const int rows = task.rows, first = task.first;
  const int g = lane >> 2, t = lane & 3;
  const float scale = is_shared ? 1.0f : kMoeAlphaScale;
  const float alpha[3] = {task.alpha[0] * scale, task.alpha[1] * scale, task.alpha[2] * scale};  // before the wait
  spin_until([&] { return mbarrier_try_wait_long(partial_full, phase); }, "moe ring: partial sums", task.counter,
             task.strip);
  float sum[4] = {};
#pragma unroll
  for (int from = 0; from < Traits::kGroups; ++from) {
    const float4 p = *reinterpret_cast<const float4*>(partial + (from * 4 + warp) * 128 + lane * 4);
    sum[0] += p.x, sum[1] += p.y, sum[2] += p.z, sum[3] += p.w;
  }
  ptx::mbarrier_arrive(partial_empty);

  if (!task.is_fc2) {
    const float alpha_gate = alpha[0], alpha_up = alpha[1];
    const int column = moe_fc1_row(task.strip, warp, g);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * t + i;
      if (row >= rows) continue;
      const int slot = is_shared ? first + row : shared.routing.slots[first + row];  // shared: the token
      const float gate = round_bf16(sum[i] * alpha_gate), up = round_bf16(sum[2 + i] * alpha_up);
      bf16* h = is_shared ? args.shared_h + static_cast<int64_t>(slot) * args.shared.inter
                          : args.h + static_cast<int64_t>(slot) * args.shape.inter;
      h[column] = encode_bf16(swiglu(gate, up, is_shared ? 1.0f : shared.routing.rho[slot], args.swiglu_limit));
    }
    fence_proxy_async_all();
    ptx::named_barrier_sync(1, 128);
    if (warp == 0 && lane == 0) add_release(&args.fc1_done[task.counter], 1);
    return;
  }
  const float alpha_down = alpha[2];
  const int column = moe_fc2_row(task.strip, warp, g);  // row g + 8 is two columns on
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i;
    if (row >= rows) continue;
    bf16* out =
        (is_shared ? args.shared_y + static_cast<int64_t>(first + row) * args.shape.hidden
                   : args.slot_y + static_cast<int64_t>(shared.routing.slots[first + row]) * args.shape.hidden) +
        column;
    out[0] = encode_bf16(sum[i] * alpha_down);
    out[2] = encode_bf16(sum[2 + i] * alpha_down);
  }
  ptx::named_barrier_sync(1, 128);
  const uint32_t tasks_of_strip = static_cast<uint32_t>(tasks.shared_chunks + tasks.chunks);
  if (warp == 0 && lane == 0) {
    shared.flag = add_acq_rel(&args.fc2_done[task.strip], 1);
    if (shared.flag == tasks_of_strip - 1) args.fc2_done[task.strip] = 0;  // as it was found
  }
  ptx::named_barrier_sync(1, 128);
  if (shared.flag == tasks_of_strip - 1) ring_combine<Traits>(args, shared, task.strip, warp * 32 + lane);
}

template <class Traits>
__device__ void ring_math(const MoeStreamArgs& args, typename Traits::Shared& shared, uint8_t* ring, uint64_t* full,
                          uint64_t* empty, const RingTasks& tasks) {
  const int group = threadIdx.x / 128, warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
  int first_stage = 0, count = 0;  // of the task, counted over all tasks of this CTA
  for (int v = tasks.own; v < tasks.count; v += gridDim.x) {
    const RingTask task = ring_task<Traits>(args, shared, tasks, v);
    const int buffer = count % Traits::kBuffers;
    const uint32_t phase = (count / Traits::kBuffers) & 1;
    float* partial = shared.partial[buffer];
    ring_task_sums<Traits>(ring, full, empty, task, group, warp, lane, first_stage, partial,
                           &shared.partial_empty[buffer], phase);
    first_stage += (task.blocks + Traits::kStageBlocks - 1) / Traits::kStageBlocks;
    ptx::mbarrier_arrive(&shared.partial_full[buffer]);
    ++count;
  }
}

template <class Traits>
__device__ void ring_finish(const MoeStreamArgs& args, typename Traits::Shared& shared, const RingTasks& tasks) {
  const int warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
  int buffer = 0;
  uint32_t phase = 0;
  for (int v = tasks.own; v < tasks.count; v += gridDim.x) {
    const RingTask task = ring_task<Traits>(args, shared, tasks, v);
    ring_epilogue<Traits>(args, shared, tasks, task, shared.partial[buffer], &shared.partial_full[buffer],
                          &shared.partial_empty[buffer], phase, warp, lane);
    if (++buffer == Traits::kBuffers) buffer = 0, phase ^= 1;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) moe_ring_kernel(const __grid_constant__ MoeStreamArgs args) {
  extern __shared__ __align__(128) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(smem);
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + Traits::kRingOffset - 16 * 32);
  uint64_t* empty = full + Traits::kStages;
  uint8_t* ring = smem + Traits::kRingOffset;
  const int warp = threadIdx.x / 32;

  constexpr int kFirstLoader = Traits::kMathWarps + Traits::kFinishWarps;

  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&full[i], 2);     // one arrival for weights, one for rows
      ptx::mbarrier_init(&empty[i], 128);  // the group that used it
    }
    for (int i = 0; i < Traits::kBuffers; ++i) {
      ptx::mbarrier_init(&shared.partial_full[i], 32 * Traits::kMathWarps);
      ptx::mbarrier_init(&shared.partial_empty[i], 32 * Traits::kFinishWarps);
    }
    ptx::mbarrier_init(&shared.placed, 1);
    ptx::mbarrier_init(&shared.routed, 32);
    ptx::fence_mbarrier_init();
  }
  if (Traits::kShared && warp == 1) prefetch_shared(args);
  if (warp == 2) ring_prefetch(args);
  const int loader = warp - kFirstLoader;
  const uint32_t drawn = threadIdx.x == 32 * kFirstLoader ? ring_draw(args) : 0;
  __syncthreads();
  RingTasks tasks;
  RingLoad load;
  const bool few = ring_few_slots(args), loads_weights = loader >= 0 && loader < Traits::kLoaders;
  ptx::griddepcontrol_wait();
  if (few && loads_weights) {
    load = ring_begin<Traits>(args, shared, loader, drawn, tasks);
  } else {
    if (few) {
      spin_until([&] { return mbarrier_try_wait_long(&shared.routed, 0); }, "moe ring: routing", 0, 0);
    } else {
      if (threadIdx.x == 32 * kFirstLoader) {
        shared.drawn = drawn;
        shared.first_task = ring_first_task(args, drawn);
      }
      stream_route<Traits>(args, shared, reinterpret_cast<int*>(ring));
      fence_proxy_async_all();  // the ring was scratch until here
      __syncthreads();
      if (loader == 0) ptx::mbarrier_arrive(&shared.routed);
    }
    tasks = ring_tasks<Traits>(args, shared.num_chunks, shared.first_task);
    if (loads_weights && tasks.own < tasks.count) {
      load.task = ring_task<Traits>(args, shared, tasks, tasks.own);
      load.words = ring_words(load.task, 0);
    }
  }
  if (warp == Traits::kMathWarps) {
    if (threadIdx.x % 32 == 0) ring_end_draws(args, shared.drawn);
    __syncwarp();
    ptx::griddepcontrol_launch_dependents();
  }

  if (tasks.chunks + tasks.shared_chunks == 0) {  // nothing routed: y is the shared part alone
    if (threadIdx.x >= 128) return;
    for (int strip = blockIdx.x; strip < tasks.strips2; strip += gridDim.x)
      ring_combine<Traits>(args, shared, strip, threadIdx.x);
    return;
  }
  if (warp < Traits::kMathWarps)
    ring_math<Traits>(args, shared, ring, full, empty, tasks);
  else if (loader < 0)
    ring_finish<Traits>(args, shared, tasks);
  else if (loads_weights)
    ring_load_weights<Traits>(args, shared, ring, full, empty, tasks, loader, load);
  else
    ring_load_rows<Traits>(args, shared, ring, full, empty, tasks, loader - Traits::kLoaders);
}

}  // namespace dsv4::sm90
