// Ring tier of the MoE layer on Hopper: one launch like the streaming tier (moe_stream_sm90.cuh), for one to three tokens, where
// that one has too few tasks to fill the machine.
//
// Task = 64 weight rows x up to 8 token rows of one expert. Two producer threads copy packed strips in task order (all of fc1,
// then all of fc2) into a ring while two warps bring the token rows, which do wait (fc2's for the h of their chunk). Groups
// of four math warps take ring stages in turn (split-K inside the CTA); four more warps add their sums in a fixed order and run the
// epilogue. The last task of a strip combines.
#pragma once

#include "ops/moe/moe_stream_route_sm90.cuh"

namespace dsv4::sm90 {

template <StreamMode kMode_ = StreamMode::kFull>
struct RingTraits {
  static constexpr int kMaxSlots = kRingMaxSlots, kMaxRows = 8;
  static constexpr StreamMode kMode = kMode_;
  static constexpr int kGroups = 4;                  // split-K groups of four warps
  static constexpr int kMathWarps = 4 * kGroups;
  static constexpr int kLoaders = 2;                 // warps that copy weights, and as many that copy rows: one alone takes
                                                     // 350 ns a stage, too long at 34 bytes/ns
  static constexpr int kFinishWarps = 4;             // add the groups' sums and run the epilogue, so that decoding never stops for it
  static constexpr int kBuffers = 4;  // tasks whose sums may wait for them
  static constexpr int kThreads = 32 * (kMathWarps + kFinishWarps + 2 * kLoaders);
  static constexpr int kStageBlocks = 4;             // K256
  static constexpr int kWeightBytes = kStageBlocks * kMoeBlockBytes;
  static constexpr int kRowPitch = kStageBlocks * 128 + 16;  // 16 more: the eight rows of a fragment hit different banks
  static constexpr int kStageBytes = kWeightBytes + kMaxRows * kRowPitch;
  static constexpr int kPartialFloats = kMathWarps * 32 * 4;

  struct Shared {
    float partial[kBuffers][kPartialFloats];
    float rho[kMaxSlots];
    uint16_t slots[kMaxSlots];                 // sorted by expert, then token
    uint8_t order[kMaxSlots];                  // per token: its topk positions by expert id
    uint16_t chunk_expert[kMaxSlots];
    uint16_t chunk_first[kMaxSlots];
    uint16_t chunk_rows[kMaxSlots];
    uint64_t partial_full[kBuffers], partial_empty[kBuffers];
    int num_chunks;
    uint32_t flag, exit_flag;
  };
  static constexpr int kMaxSmem = 227 * 1024;
  static constexpr int kRingOffset = (sizeof(Shared) + 16 * 32 + 127) / 128 * 128;
  // A multiple of kGroups: then a stage is always the same group's, and a group that runs ahead of another can never mistake
  // the phase before the one it waits for (parities repeat every two uses).
  static constexpr int kStages = (kMaxSmem - kRingOffset) / kStageBytes / kGroups * kGroups;
  static constexpr int kSmemBytes = kRingOffset + kStages * kStageBytes;
  static_assert(kStages >= 2 * kGroups && kStages <= 16);
};

// Tasks v = 0 .. num_chunks * (strips1 + strips2) - 1: fc1 of every chunk, then fc2 of every chunk, strips innermost.
struct RingTask {
  bool is_fc2;
  int chunk, strip, blocks;
  const uint8_t* weights;
};
template <class Shared>
__device__ __forceinline__ RingTask ring_task(const MoeStreamArgs& args, const Shared& shared, int v, int strips1, int strips2) {
  RingTask task;
  const int first2 = shared.num_chunks * strips1;
  task.is_fc2 = v >= first2;
  const int strips = task.is_fc2 ? strips2 : strips1;
  const int w = task.is_fc2 ? v - first2 : v;
  task.chunk = w / strips;
  task.strip = w - task.chunk * strips;
  task.blocks = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  const int64_t strip = static_cast<int64_t>(shared.chunk_expert[task.chunk]) * strips + task.strip;
  task.weights = (task.is_fc2 ? args.experts.fc2 : args.experts.fc1) + strip * task.blocks * kMoeBlockBytes;
  return task;
}

// Loader `self` of kLoaders takes every kLoaders-th stage.
template <class Traits>
__device__ void ring_load_weights(const MoeStreamArgs& args, const typename Traits::Shared& shared, uint8_t* ring, uint64_t* full,
                                    uint64_t* empty, int strips1, int strips2, int self) {
  if (threadIdx.x % 32 != 0) return;
  const int tasks = shared.num_chunks * (strips1 + strips2);
  RingPosition<Traits::kStages> at;
  int turn = 0;
  for (int v = blockIdx.x; v < tasks; v += gridDim.x) {
    const RingTask task = ring_task(args, shared, v, strips1, strips2);
    for (int block = 0; block < task.blocks; block += Traits::kStageBlocks, at.advance(), turn = (turn + 1) % Traits::kLoaders) {
      if (turn != self) continue;
      const uint32_t bytes = min(Traits::kStageBlocks, task.blocks - block) * kMoeBlockBytes;
      spin_until([&] { return mbarrier_try_wait_long(&empty[at.stage], at.phase ^ 1); }, "moe ring: ring slot for weights", v, block);
      if constexpr (Traits::kMode == StreamMode::kMathOnly) {
        ptx::mbarrier_arrive(&full[at.stage]);
      } else {
        ptx::mbarrier_arrive_expect_tx(&full[at.stage], bytes);
        ptx::bulk_load(ring + at.stage * Traits::kStageBytes, task.weights + static_cast<int64_t>(block) * kMoeBlockBytes, bytes,
                       &full[at.stage], ptx::L2Hint::kEvictFirst);
      }
    }
  }
}

template <class Traits>
__device__ void ring_load_rows(const MoeStreamArgs& args, const typename Traits::Shared& shared, uint8_t* ring, uint64_t* full,
                                 uint64_t* empty, int strips1, int strips2, int self) {
  const int lane = threadIdx.x % 32;
  const int tasks = shared.num_chunks * (strips1 + strips2);
  RingPosition<Traits::kStages> at;
  int ready_chunk = -1, turn = 0;
  for (int v = blockIdx.x; v < tasks; v += gridDim.x) {
    const RingTask task = ring_task(args, shared, v, strips1, strips2);
    const int rows = shared.chunk_rows[task.chunk];
    if (task.is_fc2 && ready_chunk != task.chunk) {
      spin_until([&] { return load_acquire(&args.fc1_done[task.chunk]) >= static_cast<uint32_t>(strips1); },
                 "moe ring: h of a chunk", task.chunk, strips1);
      fence_proxy_async_all();  // h was written by ordinary stores, the copy engine reads it
      ready_chunk = task.chunk;
    }
    const bf16* source = nullptr;
    if (lane < rows) {
      const int slot = shared.slots[shared.chunk_first[task.chunk] + lane];
      source = task.is_fc2 ? args.h + static_cast<int64_t>(slot) * args.shape.inter
                           : args.x + static_cast<int64_t>(slot / args.shape.num_topk) * args.shape.hidden;
    }
    for (int block = 0; block < task.blocks; block += Traits::kStageBlocks, at.advance(), turn = (turn + 1) % Traits::kLoaders) {
      if (turn != self) continue;
      const uint32_t bytes = min(Traits::kStageBlocks, task.blocks - block) * 128;
      spin_until([&] { return mbarrier_try_wait_long(&empty[at.stage], at.phase ^ 1); }, "moe ring: ring slot for rows", v, block);
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(&full[at.stage], bytes * rows);
      __syncwarp();
      if (lane < rows)
        ptx::bulk_load(ring + at.stage * Traits::kStageBytes + Traits::kWeightBytes + lane * Traits::kRowPitch,
                       source + block * kMoeBlockCols, bytes, &full[at.stage]);
    }
  }
}

// What a warp needs of one block: 16 weight rows, 8 token rows.
struct RingOperands {
  uint4 codes, rows[2];
  uint32_t scales;
};
template <class Traits>
__device__ __forceinline__ void ring_fetch(RingOperands& o, uint32_t stage_address, int block, int warp, int lane) {
  const uint32_t thread = warp * 32 + lane;
  const uint32_t weights = stage_address + block * kMoeBlockBytes;
  const uint32_t rows = stage_address + Traits::kWeightBytes + (lane >> 2) * Traits::kRowPitch + (lane & 3) * 32 + block * 128;
  load_shared_16(o.codes, weights + thread * 16);
  o.scales = load_shared_u16(weights + kMoeBlockCodeBytes + thread * 2);
  load_shared_16(o.rows[0], rows);
  load_shared_16(o.rows[1], rows + 16);
}
__device__ __forceinline__ void ring_multiply(const RingOperands& o, float (&sum)[2][4]) {
  uint32_t a[2][2][4];
  decode_block(o.codes, o.scales, a);
  mma_m16n8k16(sum[0], a[0][0], o.rows[0].x, o.rows[0].y);  // two sums: half the dependent chain
  mma_m16n8k16(sum[1], a[0][1], o.rows[0].z, o.rows[0].w);
  mma_m16n8k16(sum[0], a[1][0], o.rows[1].x, o.rows[1].y);
  mma_m16n8k16(sum[1], a[1][1], o.rows[1].z, o.rows[1].w);
}
// One ring stage of one warp. The next block's operands are fetched before a block is decoded.
template <class Traits>
__device__ __forceinline__ void ring_stage(uint32_t stage_address, int blocks, int warp, int lane, float (&sum)[2][4]) {
  RingOperands o[2];
  if (blocks >= Traits::kStageBlocks) {
    ring_fetch<Traits>(o[0], stage_address, 0, warp, lane);
#pragma unroll
    for (int block = 0; block < Traits::kStageBlocks; ++block) {
      if (block + 1 < Traits::kStageBlocks) ring_fetch<Traits>(o[(block + 1) % 2], stage_address, block + 1, warp, lane);
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
__device__ __forceinline__ void ring_task_sums(uint8_t* ring, uint64_t* full, uint64_t* empty, const RingTask& task, int group,
                                                 int warp, int lane, int first_stage, float* partial,
                                                 uint64_t* partial_empty, uint32_t partial_phase) {
  float sum[2][4] = {};
  const int stages = (task.blocks + Traits::kStageBlocks - 1) / Traits::kStageBlocks;
  for (int i = (group + Traits::kGroups - first_stage % Traits::kGroups) % Traits::kGroups; i < stages; i += Traits::kGroups) {
    const uint32_t at = static_cast<uint32_t>(first_stage + i), stage = at % Traits::kStages, phase = at / Traits::kStages & 1;
    spin_until([&] { return mbarrier_try_wait_long(&full[stage], phase); }, "moe ring: stage filled", task.chunk, i);
    if constexpr (Traits::kMode != StreamMode::kWeightsOnly)
      ring_stage<Traits>(ptx::smem_address(ring + stage * Traits::kStageBytes), task.blocks - i * Traits::kStageBlocks, warp,
                                   lane, sum);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&empty[stage]);
  }
  spin_until([&] { return mbarrier_try_wait_long(partial_empty, partial_phase ^ 1); }, "moe ring: partial sums free", task.chunk, 0);
  *reinterpret_cast<float4*>(partial + (group * 4 + warp) * 128 + lane * 4) =
      make_float4(sum[0][0] + sum[1][0], sum[0][1] + sum[1][1], sum[0][2] + sum[1][2], sum[0][3] + sum[1][3]);
}

// y of 64 output columns for every token: the slots' outputs added in order of expert id.
template <class Traits>
__device__ __forceinline__ void ring_combine(const MoeStreamArgs& args, const typename Traits::Shared& shared, int strip, int thread) {
  const int lane = thread & 15, hidden = args.shape.hidden, topk = args.shape.num_topk;
  for (int token = thread >> 4; token < args.num_tokens; token += 8) {
    float sum[4] = {};
    const int64_t column = strip * 64 + lane * 4;
#pragma unroll 6
    for (int k = 0; k < topk; ++k) {
      const int place = shared.order[token * topk + k];
      if (place == 0xff) continue;
      const uint2 v = __ldcg(reinterpret_cast<const uint2*>(args.slot_y + static_cast<int64_t>(token * topk + place) * hidden + column));
      sum[0] += __uint_as_float(v.x << 16);
      sum[1] += __uint_as_float(v.x & 0xffff0000u);
      sum[2] += __uint_as_float(v.y << 16);
      sum[3] += __uint_as_float(v.y & 0xffff0000u);
    }
    if (args.shared_y) {
      const uint2 v = *reinterpret_cast<const uint2*>(args.shared_y + static_cast<int64_t>(token) * hidden + column);
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
__device__ __forceinline__ void ring_epilogue(const MoeStreamArgs& args, typename Traits::Shared& shared, const RingTask& task,
                                                const float* partial, uint64_t* partial_full, uint64_t* partial_empty, uint32_t phase,
                                                int warp, int lane) {
  const int rows = shared.chunk_rows[task.chunk], first = shared.chunk_first[task.chunk];
  const int g = lane >> 2, t = lane & 3;
  const float* alpha_of = args.experts.alpha + shared.chunk_expert[task.chunk] * 3;
  const float alpha[3] = {alpha_of[0] * kMoeAlphaScale, alpha_of[1] * kMoeAlphaScale, alpha_of[2] * kMoeAlphaScale};  // before the wait
  spin_until([&] { return mbarrier_try_wait_long(partial_full, phase); }, "moe ring: partial sums", task.chunk, task.strip);
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
      const int slot = shared.slots[first + row];
      const float gate = round_bf16(sum[i] * alpha_gate), up = round_bf16(sum[2 + i] * alpha_up);
      args.h[static_cast<int64_t>(slot) * args.shape.inter + column] =
          encode_bf16(swiglu(gate, up, shared.rho[slot], args.swiglu_limit));
    }
    fence_proxy_async_all();
    ptx::named_barrier_sync(1, 128);
    if (warp == 0 && lane == 0) add_release(&args.fc1_done[task.chunk], 1);
    return;
  }
  const float alpha_down = alpha[2];
  const int column = moe_fc2_row(task.strip, warp, g);  // row g + 8 is two columns on
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i;
    if (row >= rows) continue;
    bf16* out = args.slot_y + static_cast<int64_t>(shared.slots[first + row]) * args.shape.hidden + column;
    out[0] = encode_bf16(sum[i] * alpha_down);
    out[2] = encode_bf16(sum[2 + i] * alpha_down);
  }
  ptx::named_barrier_sync(1, 128);
  if (warp == 0 && lane == 0) shared.flag = add_acq_rel(&args.fc2_done[task.strip], 1);
  ptx::named_barrier_sync(1, 128);
  if (shared.flag == static_cast<uint32_t>(shared.num_chunks) - 1)
    ring_combine<Traits>(args, shared, task.strip, warp * 32 + lane);
}

template <class Traits>
__device__ void ring_math(const MoeStreamArgs& args, typename Traits::Shared& shared, uint8_t* ring, uint64_t* full, uint64_t* empty,
                            int strips1, int strips2) {
  const int group = threadIdx.x / 128, warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
  const int tasks = shared.num_chunks * (strips1 + strips2);
  int first_stage = 0, count = 0;  // of the task, counted over all tasks of this CTA
  for (int v = blockIdx.x; v < tasks; v += gridDim.x, ++count) {
    const RingTask task = ring_task(args, shared, v, strips1, strips2);
    const int buffer = count % Traits::kBuffers;
    const uint32_t phase = (count / Traits::kBuffers) & 1;
    float* partial = shared.partial[buffer];
    ring_task_sums<Traits>(ring, full, empty, task, group, warp, lane, first_stage, partial, &shared.partial_empty[buffer], phase);
    first_stage += (task.blocks + Traits::kStageBlocks - 1) / Traits::kStageBlocks;
    ptx::mbarrier_arrive(&shared.partial_full[buffer]);
  }
}

template <class Traits>
__device__ void ring_finish(const MoeStreamArgs& args, typename Traits::Shared& shared, int strips1, int strips2) {
  const int warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
  const int tasks = shared.num_chunks * (strips1 + strips2);
  int buffer = 0;
  uint32_t phase = 0;
  for (int v = blockIdx.x; v < tasks; v += gridDim.x) {
    const RingTask task = ring_task(args, shared, v, strips1, strips2);
    ring_epilogue<Traits>(args, shared, task, shared.partial[buffer], &shared.partial_full[buffer], &shared.partial_empty[buffer], phase,
                            warp, lane);
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
  const int strips1 = static_cast<int>(moe_fc1_strips(args.shape.inter)), strips2 = static_cast<int>(moe_fc2_strips(args.shape.hidden));

  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&full[i], 2);   // one arrival for weights, one for rows
      ptx::mbarrier_init(&empty[i], 4);  // one per warp of the group that used it
    }
    for (int i = 0; i < Traits::kBuffers; ++i) {
      ptx::mbarrier_init(&shared.partial_full[i], 32 * Traits::kMathWarps);
      ptx::mbarrier_init(&shared.partial_empty[i], 32 * Traits::kFinishWarps);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::griddepcontrol_wait();
  stream_route<Traits>(args, shared, reinterpret_cast<int*>(ring));
  fence_proxy_async_all();  // the ring was scratch until here
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();

  if (shared.num_chunks == 0) {  // nothing routed: y is the shared part alone
    for (int strip = blockIdx.x; strip < strips2; strip += gridDim.x)
      if (threadIdx.x < 128) ring_combine<Traits>(args, shared, strip, threadIdx.x);
    return;
  }
  constexpr int kFirstLoader = Traits::kMathWarps + Traits::kFinishWarps;
  if (warp < Traits::kMathWarps)
    ring_math<Traits>(args, shared, ring, full, empty, strips1, strips2);
  else if (warp < kFirstLoader)
    ring_finish<Traits>(args, shared, strips1, strips2);
  else if (warp < kFirstLoader + Traits::kLoaders)
    ring_load_weights<Traits>(args, shared, ring, full, empty, strips1, strips2, warp - kFirstLoader);
  else
    ring_load_rows<Traits>(args, shared, ring, full, empty, strips1, strips2, warp - kFirstLoader - Traits::kLoaders);

  // The last CTA to finish leaves the counters as it found them.
  __syncthreads();
  if (threadIdx.x == 0) shared.exit_flag = add_acq_rel(args.exited, 1);
  __syncthreads();
  if (shared.exit_flag != gridDim.x - 1) return;
  for (int i = threadIdx.x; i < shared.num_chunks; i += Traits::kThreads) args.fc1_done[i] = 0;
  for (int i = threadIdx.x; i < strips2; i += Traits::kThreads) args.fc2_done[i] = 0;
  if (threadIdx.x == 0) *args.exited = 0;
}

}  // namespace dsv4::sm90
