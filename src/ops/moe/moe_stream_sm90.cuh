// Streaming tier of the MoE layer on Hopper, weights straight from global memory into registers.
//
// Routing, fc1, SwiGLU, fc2 and combine in one launch, for few rows per expert. A task is 256 weight rows (a group of strips) times up
// to kMaxRows token rows of one expert. Each of 16 math warps owns 16 of the weight rows over the whole contraction: sums end
// in its own lanes, nothing is added across warps, the epilogue is its own. Weights lie in fragment order, so a lane loads
// its share of a block with one 16-byte load and of two blocks' scales with one 4-byte load; a warp keeps eight blocks (K512) in flight in registers and the
// sequence of loads runs across task borders, so it never stops for an epilogue or for h. Token rows go through a ring of
// shared memory, one stage per K512, filled by a warp of its own, which also draws the tasks; another warp publishes
// finished tasks. The combine is spread over all CTAs after the last fc2 task. No CTA waits for one that is not running yet:
// tasks wait for tasks of lower tickets only.
//
// Every task's weights lie on one side of the L2 (moe_layout.h), and so does every SM. There are tickets of fc1 and of fc2 for each side: a
// CTA draws those of its own side, then helps with the other's. It draws none of fc2 before all of fc1 are drawn.
//
// kShared: the FP8 shared expert's tasks are tasks of this launch, first in both GEMMs. A half block of its weights
// (moe_shared_sm90.h) is loaded as a block of a routed expert is; decoding and the step through the token rows differ.
#pragma once

#include "ops/moe/moe_stream_products_sm90.cuh"

namespace dsv4::sm90 {

// ---- service warps ----

template <class Traits>
__device__ __forceinline__ int stream_shared_chunks(const MoeStreamArgs& args) {
  return Traits::kShared ? (args.num_tokens + Traits::kMaxRows - 1) / Traits::kMaxRows : 0;
}

// A poll and a sleep: a hardware wait wakes at every arrival and takes issue slots from the math warps.
__device__ __forceinline__ bool mbarrier_test_or_sleep(uint64_t* barrier, uint32_t parity) {
  if (ptx::mbarrier_test_wait(barrier, parity)) return true;
  __nanosleep(200);
  return false;
}

// Tasks of one GEMM on one side: of every chunk of the shared expert, then of every other, a chunk's groups innermost.
struct StreamQueue {
  int shared_groups, groups;  // of a chunk, on this side
  int shared_tasks, tasks;    // the shared expert's, and all
};
template <class Traits>
__device__ __forceinline__ StreamQueue stream_queue(const MoeStreamArgs& args, const typename Traits::Shared& shared,
                                                    bool is_fc2, uint32_t side) {
  const int64_t strips2 = moe_fc2_strips(args.shape.hidden);
  StreamQueue q;
  q.groups = moe_groups_of_side(moe_groups(is_fc2 ? strips2 : moe_fc1_strips(args.shape.inter)), side);
  q.shared_groups = moe_groups_of_side(moe_groups(is_fc2 ? strips2 : moe_fc1_strips(args.shared.inter)), side);
  q.shared_tasks = stream_shared_chunks<Traits>(args) * q.shared_groups;
  q.tasks = q.shared_tasks + shared.num_chunks * q.groups;
  return q;
}

// Draws tasks, publishes them, copies their token rows. `ticket`: the first, of fc1 on this CTA's side.
template <class Traits>
__device__ __forceinline__ void stream_produce(const MoeStreamArgs& args, typename Traits::Shared& shared,
                                               uint8_t* ring, int ticket) {
  const int lane = threadIdx.x % 32;
  const uint32_t own_side = args.experts.sides.sms.side(ptx::smid());
  const int shared_chunks = stream_shared_chunks<Traits>(args);
  RingPosition<Traits::kStages> at;
  RingPosition<Traits::kTaskSlots> slot;
  int ready_counter = -1;
  int turn = 0;  // which queue: fc1 of the own side, of the other, fc2 of the own, of the other
  const auto is_fc2_turn = [&] { return turn >= 2; };
  const auto side_of_turn = [&] { return own_side ^ (turn & 1); };
  const auto draw = [&] { return atomicAdd(&args.ticket[(is_fc2_turn() ? 2 : 0) + side_of_turn()], 1u); };
  for (;; slot.advance()) {
    for (uint64_t* barrier :
         {&shared.task_done[slot.stage], &shared.task_free[slot.stage]})  // multiplied and published
      spin_until([&] { return mbarrier_test_or_sleep(barrier, slot.phase ^ 1); }, "moe stream: task slot", ticket, 0);
    typename Traits::Task& task = shared.tasks[slot.stage];
    StreamQueue queue;
    while (true) {
      queue = stream_queue<Traits>(args, shared, is_fc2_turn(), side_of_turn());
      if (ticket < queue.tasks || ++turn == 4) break;
      ticket = static_cast<int>(__shfl_sync(0xffffffffu, lane == 0 ? draw() : 0, 0));
    }
    if (turn == 4) {
      if (lane == 0) task.blocks = 0;
      ptx::mbarrier_arrive(&shared.task_full[slot.stage]);
      return;
    }
    const bool is_fc2 = is_fc2_turn(), is_shared = Traits::kShared && ticket < queue.shared_tasks;
    const int w = is_shared ? ticket : ticket - queue.shared_tasks,
              per_chunk = is_shared ? queue.shared_groups : queue.groups;
    const int chunk = w / per_chunk, group = moe_group_of_side(side_of_turn(), w - chunk * per_chunk);
    const int counter = is_shared ? chunk : shared_chunks + chunk;
    const int64_t strips = is_fc2      ? moe_fc2_strips(args.shape.hidden)
                           : is_shared ? moe_fc1_strips(args.shared.inter)
                                       : moe_fc1_strips(args.shape.inter);
    const int columns = is_shared ? kMoeBlockCols / 2 : kMoeBlockCols;  // of a block
    const int cols = is_fc2 ? is_shared ? args.shared.inter : args.shape.inter : args.shape.hidden,
              blocks = cols / columns;
    const int expert = is_shared ? 0 : shared.routing.chunk_expert[chunk];
    const int first = is_shared ? chunk * Traits::kMaxRows : shared.routing.chunk_first[chunk];
    const int rows = is_shared ? min(Traits::kMaxRows, args.num_tokens - first) : shared.routing.chunk_rows[chunk];
    const uint8_t* weights = is_fc2 ? args.shared.fc2 : args.shared.fc1;
    const int slabs = is_shared ? 0 : moe_slab_cols(cols);
    if (!is_shared) {
      const int64_t pair = expert * moe_slab_pairs(strips, cols) + moe_first_slab_pair(group, slabs);
      const uint16_t* words = is_fc2 ? args.experts.sides.fc2 : args.experts.sides.fc1;
      weights = (is_fc2 ? args.experts.fc2 : args.experts.fc1) + pair * kMoeSlabPairBytes;
      const auto bits_of = [&](int slab) {
        return moe_chunk_bits(words && slab >= 0 && slab < slabs ? words[pair + slab] : 0, group);
      };
      for (int i = lane; i < (slabs + 1) / 2; i += 32) {
        const uint32_t bits[2] = {bits_of(2 * i), bits_of(2 * i + 1)}, before = i > 0 ? bits_of(2 * i - 1) : 0;
#pragma unroll
        for (int r = 0; r < kMoeGroupStrips; ++r) {
          const auto codes_of = [&](uint32_t b) { return b >> (2 * r) & 3; };
          const auto scales_of = [&](uint32_t b) { return b >> kMoeScaleChunk & 1; };
          const uint32_t codes = codes_of(bits[0]) | codes_of(bits[1]) << 2,
                         scales = scales_of(bits[0]) | scales_of(bits[1]) << 1;
          shared.chunk_steps[slot.stage][i][r] =
              static_cast<uint8_t>(((codes ^ codes << 1 ^ codes_of(before) >> 1) & 15) |
                                   ((scales ^ scales << 1 ^ scales_of(before)) & 3) << 4);
        }
      }
    }
    uint32_t drawn = 0;
    if (lane == 0) {
      task.weights = weights;
      task.blocks = blocks;
      task.counter = counter;
      task.strip = group * kMoeGroupStrips;
      task.strips = static_cast<int>(strips);
      task.rows = rows;
      task.first = first;
      task.is_fc2 = is_fc2;
      task.is_shared = is_shared;
    }
    ptx::mbarrier_arrive(&shared.task_full[slot.stage]);  // of every lane: each has written chunk_steps
    if (lane == 0) {
      drawn = draw();
      const float* alpha = is_shared ? args.shared.alpha : args.experts.alpha + expert * 3;
      const float scale = is_shared ? 1.0f : kMoeAlphaScale;
      task.alpha[0] = alpha[is_fc2 ? 2 : 0] * scale;
      task.alpha[1] = alpha[1] * scale;
    }
    if (is_fc2 && ready_counter != counter) {
      const uint32_t tasks1 = moe_groups(moe_fc1_strips(is_shared ? args.shared.inter : args.shape.inter));
      if (load_acquire(&args.fc1_done[counter]) < tasks1) {  // few tokens: let L2 have the weights meanwhile
        if (is_shared) {
          const uint32_t strip_bytes = blocks * kMoeFp8HalfBytes;
          const int strip = group * kMoeGroupStrips + lane;
          if (lane < kMoeGroupStrips && strip < strips)
            ptx::bulk_prefetch_l2(weights + static_cast<int64_t>(strip) * strip_bytes, strip_bytes);
        } else {
          const int64_t pair = (weights - args.experts.fc2) / kMoeSlabPairBytes;
          constexpr int kChunks = kMoeScaleChunk + 1;
          for (int i = lane; i < slabs * kChunks; i += 32) {
            const uint16_t* words = args.experts.sides.fc2;
            const uint32_t bits = moe_chunk_bits(words ? words[pair + i / kChunks] : 0, group);
            ptx::bulk_prefetch_l2(weights + i * kMoeChunkPairBytes + (bits >> (i % kChunks) & 1) * kMoeChunkBytes,
                                  kMoeChunkBytes);
          }
        }
      }
      spin_until([&] { return load_acquire(&args.fc1_done[counter]) >= tasks1; }, "moe stream: h of a chunk", counter,
                 tasks1);
      fence_proxy_async_all();  // h was written by ordinary stores, the copy engine reads it
      ready_counter = counter;
    }
    const bf16* source = nullptr;
    if (lane < rows) {
      if (is_shared) {
        source = is_fc2 ? args.shared_h + static_cast<int64_t>(first + lane) * args.shared.inter
                        : args.x + static_cast<int64_t>(first + lane) * args.shape.hidden;
      } else {
        const int s = shared.routing.slots[first + lane];
        source = is_fc2 ? args.h + static_cast<int64_t>(s) * args.shape.inter
                        : args.x + static_cast<int64_t>(s / args.shape.num_topk) * args.shape.hidden;
      }
    }
    for (int block = 0; block < blocks; block += Traits::kGroupBlocks, at.advance()) {
      const uint32_t bytes = min(Traits::kGroupBlocks, blocks - block) * columns * 2;
      spin_until([&] { return mbarrier_test_or_sleep(&shared.rows_empty[at.stage], at.phase ^ 1); },
                 "moe stream: ring slot for rows", counter, block);
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(&shared.rows_full[at.stage], bytes * rows);
      __syncwarp();
      if (lane < rows)
        ptx::bulk_load(ring + at.stage * Traits::kStageBytes + lane * Traits::kRowPitch, source + block * columns,
                       bytes, &shared.rows_full[at.stage]);
    }
    ticket = static_cast<int>(__shfl_sync(0xffffffffu, drawn, 0));
  }
}

// Tells other CTAs of finished tasks: a release waits for all earlier stores, which no math warp should.
template <class Traits>
__device__ __forceinline__ void stream_publish(const MoeStreamArgs& args, typename Traits::Shared& shared) {
  if (threadIdx.x % 32 != 0) return;
  for (RingPosition<Traits::kTaskSlots> slot;; slot.advance()) {
    spin_until([&] { return mbarrier_test_or_sleep(&shared.task_full[slot.stage], slot.phase); },
               "moe stream: task to publish", slot.stage, 0);
    const typename Traits::Task& task = shared.tasks[slot.stage];
    if (task.blocks == 0) return;
    const bool is_fc2 = task.is_fc2;
    const int counter = task.counter;
    spin_until([&] { return mbarrier_test_or_sleep(&shared.task_done[slot.stage], slot.phase); },
               "moe stream: task done", counter, is_fc2);
    fence_proxy_async_all();
    add_release(is_fc2 ? args.fc2_done : &args.fc1_done[counter], 1);
    ptx::mbarrier_arrive(&shared.task_free[slot.stage]);
  }
}

__device__ __forceinline__ void add_bf16x8(float (&sum)[8], const uint4& v) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += __uint_as_float(word[i] << 16);
    sum[2 * i + 1] += __uint_as_float(word[i] & 0xffff0000u);
  }
}

// y of this CTA's part of all (token, eight columns): the slots' outputs added in order of expert id.
template <class Traits>
__device__ __forceinline__ void stream_combine(const MoeStreamArgs& args, const typename Traits::Shared& shared) {
  const int pieces = args.shape.hidden / 8, topk = args.shape.num_topk;
  for (int i = blockIdx.x * Traits::kThreads + threadIdx.x; i < args.num_tokens * pieces;
       i += gridDim.x * Traits::kThreads) {
    const int token = i / pieces, column = (i - token * pieces) * 8;
    float sum[8] = {};
#pragma unroll 6
    for (int k = 0; k < topk; ++k) {
      const int place = shared.routing.order[token * topk + k];
      if (place != 0xff)
        add_bf16x8(sum, __ldcg(reinterpret_cast<const uint4*>(
                            args.slot_y + static_cast<int64_t>(token * topk + place) * args.shape.hidden + column)));
    }
    const int64_t at = static_cast<int64_t>(token) * args.shape.hidden + column;
    if (args.shared_y) add_bf16x8(sum, __ldcg(reinterpret_cast<const uint4*>(args.shared_y + at)));
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out[j] = encode_bf16(sum[2 * j]).bits | uint32_t(encode_bf16(sum[2 * j + 1]).bits) << 16;
    *reinterpret_cast<uint4*>(args.y + at) = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

#ifdef DSV4_MOE_TRACE  // nanosecond stamps [ctas, 8] for docs/kernels/moe_sm90.md
static __device__ unsigned long long moe_trace[256 * 8];
#define DSV4_MOE_STAMP(i)                                   \
  do {                                                      \
    unsigned long long now;                                 \
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); \
    moe_trace[blockIdx.x * 8 + (i)] = now;                  \
  } while (false)
#else
#define DSV4_MOE_STAMP(i)
#endif

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) moe_stream_kernel(const __grid_constant__ MoeStreamArgs args) {
  extern __shared__ __align__(128) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(smem);
  uint8_t* ring = smem + Traits::kRingOffset;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) DSV4_MOE_STAMP(0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kTaskSlots; ++i) {
      ptx::mbarrier_init(&shared.task_full[i], 32);
      ptx::mbarrier_init(&shared.task_done[i], 32 * Traits::kMathWarps);
      ptx::mbarrier_init(&shared.task_free[i], 1);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&shared.rows_full[i], 1);
      ptx::mbarrier_init(&shared.rows_empty[i], 32 * Traits::kMathWarps);
    }
    ptx::fence_mbarrier_init();
  }
  if (Traits::kShared && warp == 1) prefetch_shared(args);
  ptx::griddepcontrol_wait();
  if (threadIdx.x == 0) DSV4_MOE_STAMP(1);
  uint32_t ticket = 0;
  if (threadIdx.x == 32 * Traits::kMathWarps)
    ticket = atomicAdd(&args.ticket[args.experts.sides.sms.side(ptx::smid())], 1u);
  for (int i = threadIdx.x; i < Traits::kRowPitch / 4; i += Traits::kThreads)
    reinterpret_cast<uint32_t*>(shared.zero_row)[i] = 0;
  stream_route<Traits>(args, shared, reinterpret_cast<int*>(ring));
  fence_proxy_async_all();  // the ring was scratch until here
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) DSV4_MOE_STAMP(2);

  if (warp < Traits::kMathWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kMathRegisters));
    stream_math<Traits>(args, shared, ring);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kServiceRegisters));
    if (warp == Traits::kMathWarps)
      stream_produce<Traits>(args, shared, ring, static_cast<int>(__shfl_sync(0xffffffffu, ticket, 0)));
    if (warp == Traits::kMathWarps + 1) stream_publish<Traits>(args, shared);
  }

  if (threadIdx.x == 0) {
    DSV4_MOE_STAMP(3);
    const uint32_t tasks =
        (shared.num_chunks + stream_shared_chunks<Traits>(args)) * moe_groups(moe_fc2_strips(args.shape.hidden));
    spin_until([&] { return load_acquire(args.fc2_done) >= tasks; }, "moe stream: all slot outputs",
               static_cast<int>(tasks), 0);
    DSV4_MOE_STAMP(4);
  }
  __syncthreads();
  stream_combine<Traits>(args, shared);

  // The last CTA to finish leaves the counters as it found them.
  __syncthreads();
  if (threadIdx.x == 0) DSV4_MOE_STAMP(5);
  if (threadIdx.x == 0) shared.exit_flag = add_acq_rel(args.exited, 1);
  __syncthreads();
  if (shared.exit_flag != gridDim.x - 1) return;
  for (int i = threadIdx.x; i < shared.num_chunks + stream_shared_chunks<Traits>(args); i += Traits::kThreads)
    args.fc1_done[i] = 0;
  if (threadIdx.x < 4) args.ticket[threadIdx.x] = 0;
  if (threadIdx.x == 0) *args.fc2_done = 0, *args.exited = 0;
}

}  // namespace dsv4::sm90
