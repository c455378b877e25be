// Ring tier of the MoE layer on Hopper, first half: shape of the ring, tasks, routing of few slots, and the warps that copy. The rest and the whole:
// moe_ring_sm90.cuh.
#pragma once

#include "ops/moe/moe_stream_route_sm90.cuh"

namespace dsv4::sm90 {

__device__ __forceinline__ uint32_t add_relaxed(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}
__device__ __forceinline__ uint32_t exchange_relaxed(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}

template <StreamMode kMode_ = StreamMode::kFull, bool kShared_ = false>
struct RingTraits {
  static constexpr bool kShared = kShared_;
  static constexpr int kMaxSlots = kRingMaxSlots, kMaxRows = 8;
  static constexpr StreamMode kMode = kMode_;
  static constexpr int kGroups = 4;  // split-K groups of four warps
  static constexpr int kMathWarps = 4 * kGroups;
  static constexpr int kLoaders = 2, kRowLoaders = 2;  // warps that copy weights, and rows; four of either: slower
  static constexpr int kFinishWarps =
      4;                              // add the groups' sums and run the epilogue, so that decoding never stops for it
  static constexpr int kBuffers = 4;  // tasks whose sums may wait for them
  static constexpr int kThreads = 32 * (kMathWarps + kFinishWarps + kLoaders + kRowLoaders);
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
    RoutedSlots<kMaxSlots> routing;
    uint64_t partial_full[kBuffers], partial_empty[kBuffers];
    uint64_t placed, routed;  // first_task is there (few slots), and all that routing finds
    int num_chunks, first_task;
    uint32_t flag, drawn;
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
  int rows, first;         // token rows; the first in shared.routing.slots, or the first token
  const uint8_t* weights;  // of the shared expert: the strip; else the first slab pair of the strip's group
  const uint16_t* words;   // of that pair and those that follow, or nullptr
  const float* alpha;
};
struct RingTasks {
  int strips1, strips2, chunks;       // of the routed experts
  int shared_strips1, shared_chunks;  // of the shared one
  float per_strip1, per_strip2;       // 1 / strips
  int first2, count;
  int own;  // the CTA's first task
};

// Strip at a position of a chunk's tasks. Even positions belong to side 0 of the L2, where strips are a multiple of 16.
__device__ __forceinline__ int ring_strip(int position, int strips) {
  if (strips % 16 != 0) return position;
  const int i = position >> 1;
  return moe_group_of_side(position & 1, i / kMoeGroupStrips) * kMoeGroupStrips + i % kMoeGroupStrips;
}

template <class Traits>
__device__ __forceinline__ RingTasks ring_tasks(const MoeStreamArgs& args, int chunks, int own) {
  RingTasks t;
  t.strips1 = static_cast<int>(moe_fc1_strips(args.shape.inter)),
  t.strips2 = static_cast<int>(moe_fc2_strips(args.shape.hidden));
  t.chunks = chunks;
  t.shared_strips1 = Traits::kShared ? static_cast<int>(moe_fc1_strips(args.shared.inter)) : 0;
  t.shared_chunks = Traits::kShared ? (args.num_tokens + Traits::kMaxRows - 1) / Traits::kMaxRows : 0;
  t.first2 = t.chunks * t.strips1 + t.shared_chunks * t.shared_strips1;
  t.count = t.first2 + (t.chunks + t.shared_chunks) * t.strips2;
  t.own = own;
  t.per_strip1 = 1.0f / static_cast<float>(t.strips1), t.per_strip2 = 1.0f / static_cast<float>(t.strips2);
  return t;
}
// expert_of(chunk): where shared.routing.chunk_expert is not there yet; nor are then (not kListed) the task's rows.
template <class Traits, bool kListed, class ExpertOf>
__device__ __forceinline__ RingTask ring_task(const MoeStreamArgs& args, const typename Traits::Shared& shared,
                                              const RingTasks& tasks, int v, const ExpertOf& expert_of) {
  RingTask task;
  task.is_fc2 = v >= tasks.first2;
  int w = task.is_fc2 ? v - tasks.first2 : v;
  const int shared_strips = task.is_fc2 ? tasks.strips2 : tasks.shared_strips1,
            shared_tasks = tasks.shared_chunks * shared_strips;
  task.is_shared = Traits::kShared && w < shared_tasks;
  if (!task.is_shared) w -= shared_tasks;
  const int strips = task.is_shared ? shared_strips : task.is_fc2 ? tasks.strips2 : tasks.strips1;
  // w / strips: w + 1 / 2 is 1 / (2 strips) away from where the quotient changes, far more than it is rounded by.
  const int chunk =
      task.is_shared
          ? w / strips
          : static_cast<int>((static_cast<float>(w) + 0.5f) * (task.is_fc2 ? tasks.per_strip2 : tasks.per_strip1));
  task.strip = w - chunk * strips;
  if (!task.is_shared) task.strip = ring_strip(task.strip, strips);
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
    task.rows = kListed ? shared.routing.chunk_rows[chunk] : 0,
    task.first = kListed ? shared.routing.chunk_first[chunk] : 0;
    const int expert = expert_of(chunk);
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
template <class Traits>
__device__ __forceinline__ RingTask ring_task(const MoeStreamArgs& args, const typename Traits::Shared& shared,
                                              const RingTasks& tasks, int v) {
  return ring_task<Traits, true>(args, shared, tasks, v,
                                 [&](int chunk) { return int{shared.routing.chunk_expert[chunk]}; });
}

// Where a stage of a routed expert lies, from the task's weights on: a strip's part of a slab, two chunks of codes, then the scales of each.
// One slab a lane, by its word: slabs first .. first + 31.
struct RingPlaces {
  uint32_t codes[2], scales;
};
__device__ __forceinline__ RingPlaces ring_places(const RingTask& task, int first, uint32_t word) {
  const uint32_t slab = first + threadIdx.x % 32, pair = slab * static_cast<uint32_t>(kMoeSlabPairBytes);
  const uint32_t bits = moe_chunk_bits(word, task.strip / kMoeGroupStrips);
  const auto place = [&](int half) { return moe_block_place(task.strip, 2 * half, bits); };
  return {{pair + static_cast<uint32_t>(place(0).codes), pair + static_cast<uint32_t>(place(1).codes)},
          pair + static_cast<uint32_t>(place(0).scales)};
}
template <class Traits>
__device__ __forceinline__ void ring_copy_slab(uint8_t* stage, const uint8_t* weights, const RingPlaces& places,
                                               uint64_t* full) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ptx::bulk_load(stage + half * kMoeChunkBytes, weights + places.codes[half], kMoeChunkBytes, full,
                   ptx::L2Hint::kEvictFirst);
    ptx::bulk_load(stage + Traits::kScalesAt + half * kMoePairScaleBytes,
                   weights + places.scales + half * kMoeHalfSlabScaleBytes, kMoePairScaleBytes, full,
                   ptx::L2Hint::kEvictFirst);
  }
}

// ---- begin: the chain of routing, words and weights is what a short launch waits for ----

// Before the wait for the kernel before this: the words of fc1, and what that kernel may still be writing, are brought into L2, where it
// writes them. Called by one warp.
__device__ __forceinline__ void ring_prefetch(const MoeStreamArgs& args) {
  const int lane = threadIdx.x % 32;
  const auto prefetch = [&](const void* from, int64_t bytes, int part) {
    for (int64_t at = (part + int64_t{lane} * gridDim.x) * 128; at < bytes; at += int64_t{32} * gridDim.x * 128)
      ptx::prefetch_l2(static_cast<const char*>(from) + at);
  };
  if (lane == 0) ptx::prefetch_l2(args.topk_idx);
  if (lane == 1) ptx::prefetch_l2(args.topk_weights);
  if (args.experts.sides.fc1) {
    const int64_t bytes = args.shape.num_experts * moe_fc1_slab_pairs(args.shape.hidden, args.shape.inter) * 2;
    for (const uint32_t part : {blockIdx.x, (blockIdx.x + gridDim.x / 2) % gridDim.x})  // twice: some CTAs start late
      prefetch(args.experts.sides.fc1, bytes, static_cast<int>(part));
  }
  prefetch(args.x, int64_t{args.num_tokens} * args.shape.hidden * 2, static_cast<int>(blockIdx.x));
}

// A CTA's first task: even ones have weights on side 0 of the L2, odd ones on side 1, and so have those that follow if the number of CTAs is
// even. CTAs draw them, of their SM's side while there are any. `drawn`: the draws before this one, those of side 1 << 16, and in bit 31 the
// side it was for, asked once. Drawing comes before the wait for the kernel before, too: that one let this one start after its
// own draws, and the last of these left the count zero.
__device__ __forceinline__ bool ring_draws(const MoeStreamArgs& args) { return args.experts.sides.sms.known; }
__device__ __forceinline__ uint32_t ring_draw(const MoeStreamArgs& args) {
  if (!ring_draws(args)) return 0;
  const uint32_t side = args.experts.sides.sms.side(ptx::smid());
  return add_relaxed(args.drawn, 1u << 16 * side) | side << 31;
}
__device__ __forceinline__ int ring_draws_of_side(uint32_t drawn, int side) {
  return static_cast<int>(drawn >> 16 * side & 0x7fff);
}
__device__ __forceinline__ int ring_first_task(const MoeStreamArgs& args, uint32_t drawn) {
  if (!ring_draws(args)) return static_cast<int>(blockIdx.x);
  const int side = static_cast<int>(drawn >> 31);
  const int even = static_cast<int>(gridDim.x + 1) / 2, odd = static_cast<int>(gridDim.x) / 2;
  const int own = side ? odd : even, other = side ? even : odd, rank = ring_draws_of_side(drawn, side);
  return rank < own ? 2 * rank + side : 2 * (other - 1 - (rank - own)) + 1 - side;
}

// One thread of each CTA, before the kernel after this may start.
__device__ __forceinline__ void ring_end_draws(const MoeStreamArgs& args, uint32_t drawn) {
  const auto draws = [](uint32_t of) { return ring_draws_of_side(of, 0) + ring_draws_of_side(of, 1); };
  if (!ring_draws(args) || draws(drawn) != static_cast<int>(gridDim.x) - 1) return;
  if (draws(exchange_relaxed(args.drawn, 0)) != static_cast<int>(gridDim.x)) __trap();  // and so it has come back
}

// What copying a task's weights begins with: `words` are of its first 32 slabs, one a lane.
struct RingLoad {
  RingTask task;
  uint32_t words;
};
__device__ __forceinline__ uint32_t ring_words(const RingTask& task, int first) {
  const int slab = first + threadIdx.x % 32;
  return task.words && slab * kMoeSlabBlocks < task.blocks ? task.words[slab] : 0;
}

// Up to 32 slots are routed by each loader for itself, in registers; the first writes down what stream_route does, for all others.
__device__ __forceinline__ bool ring_few_slots(const MoeStreamArgs& args) {
  return args.num_tokens * args.shape.num_topk <= 32;
}
template <class Traits>
__device__ __forceinline__ RingLoad ring_begin(const MoeStreamArgs& args, typename Traits::Shared& shared, int self,
                                               uint32_t drawn, RingTasks& tasks) {
  const int lane = threadIdx.x % 32, topk = args.shape.num_topk, num_slots = args.num_tokens * topk;
  const int base = lane / topk * topk;  // of the slot's token
  const uint32_t below = (1u << lane) - 1, of_token = ((1u << (topk - 1)) * 2 - 1) << base;
  RingLoad load;
  int e = -1;
  float rho = 0;
  if (lane < num_slots) {
    e = args.topk_idx[lane];
    rho = args.topk_weights[lane];
  }
  if (self == 0 && lane == 0) {
    shared.drawn = drawn;
    shared.first_task = ring_first_task(args, drawn);
    ptx::mbarrier_arrive(&shared.placed);
  }
  spin_until([&] { return mbarrier_try_wait_long(&shared.placed, 0); }, "moe ring: first task", 0, 0);
  const int own = shared.first_task;
  if (e < 0 || e >= args.shape.num_experts) e = -1;
  uint32_t smaller = 0, equal = 0;  // slots of experts with smaller ids, of the same
#pragma unroll 6
  for (int j = 0; j < num_slots; ++j) {
    const int other = __shfl_sync(0xffffffffu, e, j);
    smaller |= static_cast<uint32_t>(other < e) << j;
    equal |= static_cast<uint32_t>(other == e) << j;
  }
  const int before = __popc(equal & below);
  const bool is_slot = lane < num_slots && e >= 0, is_head = is_slot && before % Traits::kMaxRows == 0;  // of a chunk
  const uint32_t valid = __ballot_sync(0xffffffffu, is_slot), heads = __ballot_sync(0xffffffffu, is_head);
  const int chunk = __popc(smaller & heads) + before / Traits::kMaxRows, at = __popc(smaller & valid) + before;
  tasks = ring_tasks<Traits>(args, __popc(heads), own);
  load.task = ring_task<Traits, false>(args, shared, tasks, own, [&](int wanted) {
    const uint32_t head = __ballot_sync(0xffffffffu, is_head && chunk == wanted);
    return head ? __shfl_sync(0xffffffffu, e, __ffs(static_cast<int>(head)) - 1) : 0;  // 0: a CTA without tasks
  });
  load.words = ring_words(load.task, 0);
  if (self != 0) return load;
  if (is_head) {
    shared.routing.chunk_expert[chunk] = static_cast<uint16_t>(e);
    shared.routing.chunk_first[chunk] = static_cast<uint16_t>(at);
    shared.routing.chunk_rows[chunk] = static_cast<uint16_t>(min(Traits::kMaxRows, __popc(equal) - before));
  }
  if (is_slot) shared.routing.slots[at] = static_cast<uint16_t>(lane);
  if (lane < num_slots) {
    const int place = __popc(smaller & of_token) + __popc(equal & of_token & below);
    shared.routing.order[base + place] = static_cast<uint8_t>(e < 0 ? 0xff : lane - base);
    shared.routing.rho[lane] = rho;
  }
  if (lane == 0) shared.num_chunks = __popc(heads);
  ptx::mbarrier_arrive(&shared.routed);
  return load;
}

// Stages of a CTA's tasks are counted through. Of `kWarps` warps that share a job, `self` has every kWarps-th; its first in a task that begins
// with stage `first`:
template <int kWarps>
__device__ __forceinline__ int ring_turn(int first, int self) {
  static_assert((kWarps & (kWarps - 1)) == 0);
  return (self - first) & (kWarps - 1);
}

template <class Traits>
__device__ void ring_load_weights(const MoeStreamArgs& args, typename Traits::Shared& shared, uint8_t* ring,
                                  uint64_t* full, uint64_t* empty, const RingTasks& tasks, int self, RingLoad load) {
  static_assert(Traits::kStages % Traits::kLoaders == 0);
  int at = self, first = 0;  // the stage of the ring; the task's first
  uint32_t phase = 1;
  for (int v = tasks.own; v < tasks.count; v += gridDim.x) {
    const bool is_shared = Traits::kShared && load.task.is_shared;
    const int stages = (load.task.blocks + Traits::kStageBlocks - 1) / Traits::kStageBlocks;
    const uint8_t* weights = load.task.weights;
    asm("" : "+l"(weights));  // or it is computed anew for every stage
    RingPlaces places = ring_places(load.task, 0, load.words);
    int have = 0;  // places are of slabs have .. have + 31
    RingLoad next;
    bool has_next = v + static_cast<int>(gridDim.x) >= tasks.count;
    const auto look_ahead = [&] {  // a task's first weights wait for its words
      spin_until([&] { return mbarrier_try_wait_long(&shared.routed, 0); }, "moe ring: routing", v, self);
      next.task = ring_task<Traits>(args, shared, tasks, v + gridDim.x);
      next.words = ring_words(next.task, 0);
      has_next = true;
    };
    for (int i = ring_turn<Traits::kLoaders>(first, self); i < stages; i += Traits::kLoaders) {
      if (i - have >= 32) have += 32, places = ring_places(load.task, have, ring_words(load.task, have));
      const RingPlaces place{
          {__shfl_sync(0xffffffffu, places.codes[0], i % 32), __shfl_sync(0xffffffffu, places.codes[1], i % 32)},
          __shfl_sync(0xffffffffu, places.scales, i % 32)};
      spin_until([&] { return mbarrier_try_wait_long(&empty[at], phase); }, "moe ring: ring slot for weights", v, i);
      if (ptx::elect_one()) {
        uint8_t* stage = ring + at * Traits::kStageBytes;
        if constexpr (Traits::kMode == StreamMode::kMathOnly) {
          ptx::mbarrier_arrive(&full[at]);
        } else if (is_shared) {
          const int first_block = i * Traits::kStageBlocks;
          const uint32_t bytes = min(Traits::kStageBlocks, load.task.blocks - first_block) * kMoeFp8HalfBytes;
          ptx::mbarrier_arrive_expect_tx(&full[at], bytes);
          ptx::bulk_load(stage, weights + static_cast<int64_t>(first_block) * kMoeFp8HalfBytes, bytes, &full[at],
                         ptx::L2Hint::kEvictFirst);
        } else {
          ptx::mbarrier_arrive_expect_tx(&full[at], Traits::kWeightBytes);
          ring_copy_slab<Traits>(stage, weights, place, &full[at]);
        }
      }
      __syncwarp();
      at += Traits::kLoaders;
      if (at >= Traits::kStages) at -= Traits::kStages, phase ^= 1;
      if (!has_next && i + 3 * Traits::kLoaders >= stages) look_ahead();
    }
    if (!has_next) look_ahead();
    first += stages;
    load = next;
  }
}

template <class Traits>
__device__ void ring_load_rows(const MoeStreamArgs& args, const typename Traits::Shared& shared, uint8_t* ring,
                               uint64_t* full, uint64_t* empty, const RingTasks& tasks, int self) {
  static_assert(Traits::kStages % Traits::kRowLoaders == 0);
  const int lane = threadIdx.x % 32;
  int at = self, first = 0, ready_counter = -1;
  uint32_t phase = 1;
  for (int v = tasks.own; v < tasks.count; v += gridDim.x) {
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
        const int slot = shared.routing.slots[task.first + lane];
        source = task.is_fc2 ? args.h + static_cast<int64_t>(slot) * args.shape.inter
                             : args.x + static_cast<int64_t>(slot / args.shape.num_topk) * args.shape.hidden;
      }
    }
    const int stage_columns =  // of a full stage
        Traits::kStageBlocks * (Traits::kShared && task.is_shared ? kMoeBlockCols / 2 : kMoeBlockCols);
    const int stages = (task.blocks + Traits::kStageBlocks - 1) / Traits::kStageBlocks;
    for (int i = ring_turn<Traits::kRowLoaders>(first, self); i < stages; i += Traits::kRowLoaders) {
      const uint32_t bytes =
          static_cast<uint32_t>(min(Traits::kStageBlocks, task.blocks - i * Traits::kStageBlocks) * stage_columns) /
          Traits::kStageBlocks * 2;
      spin_until([&] { return mbarrier_try_wait_long(&empty[at], phase); }, "moe ring: ring slot for rows", v, i);
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(&full[at], bytes * task.rows);
      __syncwarp();
      if (lane < task.rows)
        ptx::bulk_load(ring + at * Traits::kStageBytes + Traits::kWeightBytes + lane * Traits::kRowPitch,
                       source + i * stage_columns, bytes, &full[at]);
      at += Traits::kRowLoaders;
      if (at >= Traits::kStages) at -= Traits::kStages, phase ^= 1;
    }
    first += stages;
  }
  // These warps are the only ones that read fc1_done, and no chunk's h goes unread: the last of all leaves the counters as it found them.
  uint32_t before = 0;
  if (lane == 0) before = add_acq_rel(args.exited, 1);
  if (__shfl_sync(0xffffffffu, before, 0) != gridDim.x * Traits::kRowLoaders - 1) return;
  for (int i = lane; i < tasks.shared_chunks + tasks.chunks; i += 32) args.fc1_done[i] = 0;
  if (lane == 0) *args.exited = 0;
}

}  // namespace dsv4::sm90
