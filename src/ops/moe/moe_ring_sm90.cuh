// Ring tier of the MoE layer on Hopper: one launch like the streaming tier (moe_stream_sm90.cuh), for one to three tokens, where
// that one has too few tasks to fill the machine.
//
// Task = 64 weight rows x up to 8 token rows of one expert. Two producer warps copy packed strips in task order (all of fc1,
// then all of fc2) into a ring while two warps bring the token rows, which do wait (fc2's for the h of their chunk). Groups
// of four math warps take ring stages in turn (split-K inside the CTA); four more warps add their sums in a fixed order and run the
// epilogue. The last task of a strip combines.
//
// kShared: the FP8 shared expert's tasks are tasks of this launch. A half block stands where a block of a routed expert does.
#pragma once

#include "ops/moe/moe_stream_route_sm90.cuh"

namespace dsv4::sm90 {

template <StreamMode kMode_ = StreamMode::kFull, bool kShared_ = false>
struct RingTraits {
  static constexpr bool kShared = kShared_;
  static constexpr int kMaxSlots = kRingMaxSlots, kMaxRows = 8;
  static constexpr StreamMode kMode = kMode_;
  static constexpr int kGroups = 4;  // split-K groups of four warps
  static constexpr int kMathWarps = 4 * kGroups;
  static constexpr int kLoaders = 2;  // warps that copy weights, and as many that copy rows: one alone takes
                                      // 350 ns a stage, too long at 34 bytes/ns
  static constexpr int kFinishWarps =
      4;                              // add the groups' sums and run the epilogue, so that decoding never stops for it
  static constexpr int kBuffers = 4;  // tasks whose sums may wait for them
  static constexpr int kThreads = 32 * (kMathWarps + kFinishWarps + 2 * kLoaders);
  static constexpr int kStageBlocks = 4;  // K256
  static_assert(kStageBlocks == kMoeSlabBlocks);
  static constexpr int kScalesAt = kStageBlocks * kMoeBlockCodeBytes;  // behind the codes of all
  static constexpr int kWeightBytes = kStageBlocks * kMoeBlockBytes;
  static constexpr int kRowPitch =
      kStageBlocks * 128 + 16;  // 16 more: the eight rows of a fragment hit different banks
  static constexpr int kStageBytes = kWeightBytes + kMaxRows * kRowPitch;
  static constexpr int kPartialFloats = kMathWarps * 32 * 4;

  struct Shared {
    float partial[kBuffers][kPartialFloats];
    float rho[kMaxSlots];
    uint16_t slots[kMaxSlots];  // sorted by expert, then token
    uint8_t order[kMaxSlots];   // per token: its topk positions by expert id
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

// Tasks v = 0 .. count - 1, those of a CTA gridDim apart: fc1 of every chunk, then fc2 of every chunk, strips innermost, in both
// the shared expert's first.
struct RingTask {
  bool is_fc2, is_shared;
  int counter;             // of fc1_done: the chunk, the shared expert's before the others
  int strip, blocks;       // blocks: of the shared expert half blocks
  int rows, first;         // token rows; the first in shared.slots, or the first token
  const uint8_t* weights;  // of the shared expert: the strip; else the first slab pair of the strip's group
  const uint16_t* words;   // of that pair and those that follow, or nullptr
  const float* alpha;
};
struct RingTasks {
  int strips1, strips2, chunks;       // of the routed experts
  int shared_strips1, shared_chunks;  // of the shared one
  int first2, count;
};
template <class Traits>
__device__ __forceinline__ RingTasks ring_tasks(const MoeStreamArgs& args, const typename Traits::Shared& shared) {
  RingTasks t;
  t.strips1 = static_cast<int>(moe_fc1_strips(args.shape.inter)),
  t.strips2 = static_cast<int>(moe_fc2_strips(args.shape.hidden));
  t.chunks = shared.num_chunks;
  t.shared_strips1 = Traits::kShared ? static_cast<int>(moe_fc1_strips(args.shared.inter)) : 0;
  t.shared_chunks = Traits::kShared ? (args.num_tokens + Traits::kMaxRows - 1) / Traits::kMaxRows : 0;
  t.first2 = t.chunks * t.strips1 + t.shared_chunks * t.shared_strips1;
  t.count = t.first2 + (t.chunks + t.shared_chunks) * t.strips2;
  return t;
}
template <class Traits>
__device__ __forceinline__ RingTask ring_task(const MoeStreamArgs& args, const typename Traits::Shared& shared,
                                              const RingTasks& tasks, int v) {
  RingTask task;
  task.is_fc2 = v >= tasks.first2;
  int w = task.is_fc2 ? v - tasks.first2 : v;
  const int shared_strips = task.is_fc2 ? tasks.strips2 : tasks.shared_strips1,
            shared_tasks = tasks.shared_chunks * shared_strips;
  task.is_shared = Traits::kShared && w < shared_tasks;
  if (!task.is_shared) w -= shared_tasks;
  const int strips = task.is_shared ? shared_strips : task.is_fc2 ? tasks.strips2 : tasks.strips1, chunk = w / strips;
  task.strip = w - chunk * strips;
  if (task.is_shared) {
    task.counter = chunk;
    task.blocks = (task.is_fc2 ? args.shared.inter : args.shape.hidden) / (kMoeBlockCols / 2);
    task.first = chunk * Traits::kMaxRows;
    task.rows = min(Traits::kMaxRows, args.num_tokens - task.first);
    task.weights = (task.is_fc2 ? args.shared.fc2 : args.shared.fc1) +
                   static_cast<int64_t>(task.strip) * task.blocks * kMoeFp8HalfBytes;
    task.words = nullptr;
    task.alpha = args.shared.alpha;
  } else {
    task.counter = tasks.shared_chunks + chunk;
    task.blocks = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
    task.rows = shared.chunk_rows[chunk], task.first = shared.chunk_first[chunk];
    const int expert = shared.chunk_expert[chunk];
    const int cols = task.is_fc2 ? args.shape.inter : args.shape.hidden;
    const int64_t pair =
        expert * moe_slab_pairs(strips, cols) + moe_first_slab_pair(task.strip / kMoeGroupStrips, moe_slab_cols(cols));
    const uint16_t* words = task.is_fc2 ? args.experts.sides.fc2 : args.experts.sides.fc1;
    task.weights = (task.is_fc2 ? args.experts.fc2 : args.experts.fc1) + pair * kMoeSlabPairBytes;
    task.words = words ? words + pair : nullptr;
    task.alpha = args.experts.alpha + expert * 3;
  }
  return task;
}

// A stage of a routed expert: a strip's part of a slab, two chunks of codes, then the scales of each.
template <class Traits>
__device__ __forceinline__ void ring_copy_slab(uint8_t* stage, const RingTask& task, int slab, uint32_t word,
                                               uint64_t* full) {
  const uint32_t bits = moe_chunk_bits(word, task.strip / kMoeGroupStrips);
  const uint8_t* pair = task.weights + slab * kMoeSlabPairBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const MoeBlockPlace place = moe_block_place(task.strip, 2 * half, bits);
    ptx::bulk_load(stage + half * kMoeChunkBytes, pair + place.codes, kMoeChunkBytes, full, ptx::L2Hint::kEvictFirst);
    ptx::bulk_load(stage + Traits::kScalesAt + half * kMoePairScaleBytes, pair + place.scales, kMoePairScaleBytes, full,
                   ptx::L2Hint::kEvictFirst);
  }
}

// Words of the task's slabs first .. first + 31, one a lane.
__device__ __forceinline__ uint32_t ring_words(const RingTask& task, int first) {
  const int slab = first + threadIdx.x % 32;
  return task.words && slab * kMoeSlabBlocks < task.blocks ? task.words[slab] : 0;
}

// The first weights wait for words, and these for the routing: so the words that this CTA's first task may want, of whichever expert, are
// brought into L2 while the routing runs.
template <class Traits>
__device__ __forceinline__ void ring_prefetch_words(const MoeStreamArgs& args) {
  const int strips = static_cast<int>(moe_fc1_strips(args.shape.inter)),
            num_slots = args.num_tokens * args.shape.num_topk;
  if (!args.experts.sides.fc1 || threadIdx.x >= num_slots) return;
  const int expert = args.topk_idx[threadIdx.x];
  if (expert < 0 || expert >= args.shape.num_experts) return;
  const int64_t pair =
      expert * moe_fc1_slab_pairs(args.shape.hidden, args.shape.inter) +
      moe_first_slab_pair(static_cast<int>(blockIdx.x) % strips / kMoeGroupStrips, moe_slab_cols(args.shape.hidden));
  ptx::prefetch_l2(args.experts.sides.fc1 + pair);
}

// Loader `self` of kLoaders takes every kLoaders-th stage.
template <class Traits>
__device__ void ring_load_weights(const MoeStreamArgs& args, const typename Traits::Shared& shared, uint8_t* ring,
                                  uint64_t* full, uint64_t* empty, const RingTasks& tasks, int self) {
  RingPosition<Traits::kStages> at;
  int turn = 0;
  uint32_t next_words = 0;
  for (int v = blockIdx.x; v < tasks.count; v += gridDim.x) {
    const RingTask task = ring_task<Traits>(args, shared, tasks, v);
    const bool is_shared = Traits::kShared && task.is_shared;
    uint32_t words = v == static_cast<int>(blockIdx.x) ? ring_words(task, 0) : next_words;
    if (v + static_cast<int>(gridDim.x) < tasks.count)  // early: a task's first weights wait for its words
      next_words = ring_words(ring_task<Traits>(args, shared, tasks, v + gridDim.x), 0);
    for (int block = 0; block < task.blocks;
         block += Traits::kStageBlocks, at.advance(), turn = (turn + 1) % Traits::kLoaders) {
      const int slab = block / kMoeSlabBlocks;
      if (slab > 0 && slab % 32 == 0) words = ring_words(task, slab);
      const uint32_t word = __shfl_sync(0xffffffffu, words, slab % 32);
      if (turn != self) continue;
      spin_until([&] { return mbarrier_try_wait_long(&empty[at.stage], at.phase ^ 1); },
                 "moe ring: ring slot for weights", v, block);
      if (!ptx::elect_one()) continue;
      uint8_t* stage = ring + at.stage * Traits::kStageBytes;
      if constexpr (Traits::kMode == StreamMode::kMathOnly) {
        ptx::mbarrier_arrive(&full[at.stage]);
      } else if (is_shared) {
        const uint32_t bytes = min(Traits::kStageBlocks, task.blocks - block) * kMoeFp8HalfBytes;
        ptx::mbarrier_arrive_expect_tx(&full[at.stage], bytes);
        ptx::bulk_load(stage, task.weights + static_cast<int64_t>(block) * kMoeFp8HalfBytes, bytes, &full[at.stage],
                       ptx::L2Hint::kEvictFirst);
      } else {
        ptx::mbarrier_arrive_expect_tx(&full[at.stage], Traits::kWeightBytes);
        ring_copy_slab<Traits>(stage, task, slab, word, &full[at.stage]);
      }
    }
  }
}

template <class Traits>
__device__ void ring_load_rows(const MoeStreamArgs& args, const typename Traits::Shared& shared, uint8_t* ring,
                               uint64_t* full, uint64_t* empty, const RingTasks& tasks, int self) {
  const int lane = threadIdx.x % 32;
  RingPosition<Traits::kStages> at;
  int ready_counter = -1, turn = 0;
  for (int v = blockIdx.x; v < tasks.count; v += gridDim.x) {
    const RingTask task = ring_task<Traits>(args, shared, tasks, v);
    if (task.is_fc2 && ready_counter != task.counter) {
      const int strips1 = task.is_shared ? tasks.shared_strips1 : tasks.strips1;
      spin_until([&] { return load_acquire(&args.fc1_done[task.counter]) >= static_cast<uint32_t>(strips1); },
                 "moe ring: h of a chunk", task.counter, strips1);
      fence_proxy_async_all();  // h was written by ordinary stores, the copy engine reads it
      ready_counter = task.counter;
    }
    const bf16* source = nullptr;
    if (lane < task.rows) {
      if (Traits::kShared && task.is_shared) {
        source = task.is_fc2 ? args.shared_h + static_cast<int64_t>(task.first + lane) * args.shared.inter
                             : args.x + static_cast<int64_t>(task.first + lane) * args.shape.hidden;
      } else {
        const int slot = shared.slots[task.first + lane];
        source = task.is_fc2 ? args.h + static_cast<int64_t>(slot) * args.shape.inter
                             : args.x + static_cast<int64_t>(slot / args.shape.num_topk) * args.shape.hidden;
      }
    }
    const int columns = Traits::kShared && task.is_shared ? kMoeBlockCols / 2 : kMoeBlockCols;  // of a block
    for (int block = 0; block < task.blocks;
         block += Traits::kStageBlocks, at.advance(), turn = (turn + 1) % Traits::kLoaders) {
      if (turn != self) continue;
      const uint32_t bytes = min(Traits::kStageBlocks, task.blocks - block) * columns * 2;
      spin_until([&] { return mbarrier_try_wait_long(&empty[at.stage], at.phase ^ 1); }, "moe ring: ring slot for rows",
                 v, block);
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(&full[at.stage], bytes * task.rows);
      __syncwarp();
      if (lane < task.rows)
        ptx::bulk_load(ring + at.stage * Traits::kStageBytes + Traits::kWeightBytes + lane * Traits::kRowPitch,
                       source + block * columns, bytes, &full[at.stage]);
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
      const int place = shared.order[token * topk + k];
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
      const int slot = is_shared ? first + row : shared.slots[first + row];  // shared: the token
      const float gate = round_bf16(sum[i] * alpha_gate), up = round_bf16(sum[2 + i] * alpha_up);
      bf16* h = is_shared ? args.shared_h + static_cast<int64_t>(slot) * args.shared.inter
                          : args.h + static_cast<int64_t>(slot) * args.shape.inter;
      h[column] = encode_bf16(swiglu(gate, up, is_shared ? 1.0f : shared.rho[slot], args.swiglu_limit));
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
    bf16* out = (is_shared ? args.shared_y + static_cast<int64_t>(first + row) * args.shape.hidden
                           : args.slot_y + static_cast<int64_t>(shared.slots[first + row]) * args.shape.hidden) +
                column;
    out[0] = encode_bf16(sum[i] * alpha_down);
    out[2] = encode_bf16(sum[2 + i] * alpha_down);
  }
  ptx::named_barrier_sync(1, 128);
  if (warp == 0 && lane == 0) shared.flag = add_acq_rel(&args.fc2_done[task.strip], 1);
  ptx::named_barrier_sync(1, 128);
  if (shared.flag == static_cast<uint32_t>(tasks.shared_chunks + tasks.chunks) - 1)
    ring_combine<Traits>(args, shared, task.strip, warp * 32 + lane);
}

template <class Traits>
__device__ void ring_math(const MoeStreamArgs& args, typename Traits::Shared& shared, uint8_t* ring, uint64_t* full,
                          uint64_t* empty, const RingTasks& tasks) {
  const int group = threadIdx.x / 128, warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
  int first_stage = 0, count = 0;  // of the task, counted over all tasks of this CTA
  for (int v = blockIdx.x; v < tasks.count; v += gridDim.x) {
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
  for (int v = blockIdx.x; v < tasks.count; v += gridDim.x) {
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

  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&full[i], 2);     // one arrival for weights, one for rows
      ptx::mbarrier_init(&empty[i], 128);  // the group that used it
    }
    for (int i = 0; i < Traits::kBuffers; ++i) {
      ptx::mbarrier_init(&shared.partial_full[i], 32 * Traits::kMathWarps);
      ptx::mbarrier_init(&shared.partial_empty[i], 32 * Traits::kFinishWarps);
    }
    ptx::fence_mbarrier_init();
  }
  if (Traits::kShared && warp == 1) prefetch_shared(args);
  ptx::griddepcontrol_wait();
  ring_prefetch_words<Traits>(args);
  stream_route<Traits>(args, shared, reinterpret_cast<int*>(ring));
  fence_proxy_async_all();  // the ring was scratch until here
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();

  const RingTasks tasks = ring_tasks<Traits>(args, shared);
  if (tasks.chunks + tasks.shared_chunks == 0) {  // nothing routed: y is the shared part alone
    for (int strip = blockIdx.x; strip < tasks.strips2; strip += gridDim.x)
      if (threadIdx.x < 128) ring_combine<Traits>(args, shared, strip, threadIdx.x);
    return;
  }
  constexpr int kFirstLoader = Traits::kMathWarps + Traits::kFinishWarps;
  if (warp < Traits::kMathWarps)
    ring_math<Traits>(args, shared, ring, full, empty, tasks);
  else if (warp < kFirstLoader)
    ring_finish<Traits>(args, shared, tasks);
  else if (warp < kFirstLoader + Traits::kLoaders)
    ring_load_weights<Traits>(args, shared, ring, full, empty, tasks, warp - kFirstLoader);
  else
    ring_load_rows<Traits>(args, shared, ring, full, empty, tasks, warp - kFirstLoader - Traits::kLoaders);

  // The last CTA to finish leaves the counters as it found them.
  __syncthreads();
  if (threadIdx.x == 0) shared.exit_flag = add_acq_rel(args.exited, 1);
  __syncthreads();
  if (shared.exit_flag != gridDim.x - 1) return;
  for (int i = threadIdx.x; i < tasks.shared_chunks + tasks.chunks; i += Traits::kThreads) args.fc1_done[i] = 0;
  for (int i = threadIdx.x; i < tasks.strips2; i += Traits::kThreads) args.fc2_done[i] = 0;
  if (threadIdx.x == 0) *args.exited = 0;
}

}  // namespace dsv4::sm90
