// Streaming tier of the MoE layer on Hopper: how shared memory is divided, and what a math warp does: weights from global memory into registers
// one group of blocks ahead, products with token rows, epilogues of fc1 and fc2. moe_stream_sm90.cuh has the other roles and the kernel.
#pragma once

#include <type_traits>

#include "ops/moe/moe_stream_route_sm90.cuh"

namespace dsv4::sm90 {

template <StreamMode kMode_ = StreamMode::kFull, bool kShared_ = false>
struct StreamTraits {
  static constexpr bool kShared = kShared_;
  static constexpr int kMaxSlots = kStreamMaxSlots, kMaxRows = 32;
  static constexpr StreamMode kMode = kMode_;
  static constexpr int kTiles = kMaxRows / 8;  // n8 tiles of the matrix instruction
  static constexpr int kMathWarps = 16;
  static constexpr int kThreads = 32 * (kMathWarps + 4);              // a warpgroup of service warps, two of them idle
  static constexpr int kMathRegisters = 104, kServiceRegisters = 64;  // 96 at launch, moved by setmaxnreg
  static_assert(kMathWarps / 4 == kMoeGroupStrips);
  static constexpr int kGroupBlocks = 8;  // blocks in a warp's registers, and of a row stage
  static constexpr int kRowPitch =
      kGroupBlocks * 128 + 16;  // 16 more: the eight rows of a fragment hit different banks
  static constexpr int kStageBytes = kMaxRows * kRowPitch;
  static constexpr int kStages = 5;
  static constexpr int kTaskSlots = 4;
  static constexpr int kMaxSlabs = kStreamMaxColumns / 256;  // of a matrix

  struct Task {
    const uint8_t* weights;  // of the group's first slab pair; of the shared expert: of the matrix's first strip
    int blocks;              // 0: no more tasks; of the shared expert: half blocks
    int counter;             // of fc1_done
    int strip, strips;
    int rows, first;  // token rows; the first in RoutedSlots::slots, or of the shared expert the first token
    bool is_fc2, is_shared;
    float alpha[2];  // valid once the task's first row stage is
  };
  struct Shared {
    alignas(16) uint8_t
        zero_row[kRowPitch];  // stands for rows a chunk does not have: what lay in the ring would only cost power
    Task tasks[kTaskSlots];
    // Of the task's slabs, two at a time (a group of blocks), and a strip: which of its chunks lie elsewhere in their pair than the chunk
    // before. Bits 0 to 3: chunks of codes, 4 and 5: of scales.
    uint8_t chunk_steps[kTaskSlots][kMaxSlabs / 2 + 1][kMoeGroupStrips];
    uint64_t task_full[kTaskSlots], task_done[kTaskSlots], task_free[kTaskSlots];
    uint64_t rows_full[kStages], rows_empty[kStages];
    RoutedSlots<kMaxSlots> routing;
    int num_chunks;
    uint32_t exit_flag;
  };
  static constexpr int kRingOffset = (sizeof(Shared) + 127) / 128 * 128;
  static constexpr int kSmemBytes = kRingOffset + kStages * kStageBytes;
  static_assert(kSmemBytes <= 227 * 1024);
};

// ---- weights ----

__device__ __forceinline__ uint4 load_weights_16(const uint8_t* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(static_cast<uint64_t>(ptx::L2Hint::kEvictFirst)));
  return v;
}
__device__ __forceinline__ uint32_t load_weights_4(const uint8_t* p) {
  uint32_t v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
               : "=r"(v)
               : "l"(p), "l"(static_cast<uint64_t>(ptx::L2Hint::kEvictFirst)));
  return v;
}
__device__ __forceinline__ uint32_t load_weights_2(const uint8_t* p) {
  uint16_t v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u16 %0, [%1], %2;"
               : "=h"(v)
               : "l"(p), "l"(static_cast<uint64_t>(ptx::L2Hint::kEvictFirst)));
  return v;
}

// A lane's share of one group of blocks.
template <class Traits>
struct StreamWeights {
  uint4 codes[Traits::kGroupBlocks];
  uint32_t scales[Traits::kGroupBlocks / 2];  // of two blocks
};

// Where a warp loads next: always one group of blocks ahead of what it multiplies. The pointers change between the two chunks of a pair in
// place: addresses of their own for every chunk would need registers that are not there.
template <class Traits>
struct StreamCursor {
  const uint8_t *codes, *scales;  // of the group's first block, if that were in this chunk of its pair
  uint32_t steps;                 // chunk_steps of the group; those of the next are at steps_at in shared memory
  uint32_t steps_at;
  int left;  // blocks of the task not yet loaded; -1 after the last task
  bool is_shared = false;

  __device__ __forceinline__ void begin_task(typename Traits::Shared& shared, uint32_t index, int warp, int lane) {
    const uint32_t slot = index % Traits::kTaskSlots;
    spin_until([&] { return mbarrier_try_wait_long(&shared.task_full[slot], index / Traits::kTaskSlots & 1); },
               "moe stream: next task", slot, warp);
    const typename Traits::Task& task = shared.tasks[slot];
    left = task.blocks > 0 ? task.blocks : -1;
    is_shared = Traits::kShared && task.is_shared;
    const int thread = (warp % 4) * 32 + lane;
    if (is_shared) {
      const int strip = min(task.strip + warp / 4, task.strips - 1);  // routed experts have padding there
      codes = task.weights + static_cast<int64_t>(strip) * task.blocks * kMoeFp8HalfBytes + thread * 16;
      scales = codes - thread * 16 + kMoeBlockCodeBytes;
    } else {
      const MoeBlockPlace place = moe_block_place(warp / 4, 0, 0);
      codes = task.weights + place.codes + thread * 16;
      scales = task.weights + place.scales + thread * 4;
      steps_at = ptx::smem_address(&shared.chunk_steps[slot][0][warp / 4]);
      next_steps();
    }
  }
  __device__ __forceinline__ void next_steps() {
    steps = load_shared_u8(steps_at);
    steps_at += kMoeGroupStrips;
  }
  // To the other chunk of the pair if bit kBit says so.
  template <int kBit>
  __device__ __forceinline__ void step(const uint8_t*& p) const {
    static_assert(kMoeChunkBytes == 1 << 12 && kBit < 12);
    p = reinterpret_cast<const uint8_t*>(reinterpret_cast<uint64_t>(p) ^ (steps << (12 - kBit) & kMoeChunkBytes));
  }
  // Block kBlock of the group, all in order. Scales come with the second of two blocks, also if the task ends with the first: the two
  // blocks before, in the same registers, must have been decoded.
  template <int kBlock, bool kFp8>
  __device__ __forceinline__ void load(StreamWeights<Traits>& w) {
    constexpr int kPair = kBlock / 2, kOdd = kBlock % 2, kSlab = kPair / 2, kHalf = kPair % 2;
    constexpr int kSlabAt = kSlab * static_cast<int>(kMoeSlabPairBytes);
    if constexpr (kFp8) {
      w.codes[kBlock] = load_weights_16(codes + kBlock * kMoeFp8HalfBytes);
      if (kOdd) w.scales[kPair] = load_weights_2(scales + kBlock * kMoeFp8HalfBytes);  // both have the same
    } else {
      if (!kOdd) step<kPair>(codes);
      w.codes[kBlock] = load_weights_16(codes + kSlabAt + kHalf * kMoeChunkPairBytes + kOdd * kMoeBlockCodeBytes);
      if (kOdd && kHalf == 0) step<4 + kSlab>(scales);
      if (kOdd) w.scales[kPair] = load_weights_4(scales + kSlabAt + kHalf * kMoeHalfSlabScaleBytes);
    }
  }
  // The same at the end of a task: `count` blocks, of either kind.
  template <int kBlock>
  __device__ __forceinline__ void load_up_to(StreamWeights<Traits>& w, int count) {
    if (kBlock - kBlock % 2 >= count) return;
    if (Traits::kShared && is_shared)
      load<kBlock, Traits::kShared>(w);
    else
      load<kBlock, false>(w);
  }
  __device__ __forceinline__ void advance(int blocks) {
    static_assert(Traits::kGroupBlocks == 2 * kMoeSlabBlocks);
    left -= blocks;
    if (Traits::kShared && is_shared) {
      codes += Traits::kGroupBlocks * kMoeFp8HalfBytes, scales += Traits::kGroupBlocks * kMoeFp8HalfBytes;
    } else {
      codes += 2 * kMoeSlabPairBytes, scales += 2 * kMoeSlabPairBytes;
      next_steps();
    }
  }
};

// ---- multiply ----

// Token fragments of half a block (K32): two matrix steps.
template <int kTiles>
struct StreamRows {
  uint4 part[kTiles];
};
template <class Traits, int kTiles>
__device__ __forceinline__ void stream_fetch_rows(StreamRows<kTiles>& rows, uint32_t address, uint32_t last_tile,
                                                  int half) {
  const int offset = half / 2 * 128 + half % 2 * 16;
#pragma unroll
  for (int tile = 0; tile + 1 < kTiles; ++tile)
    load_shared_16(rows.part[tile], address + tile * 8 * Traits::kRowPitch + offset);
  load_shared_16(rows.part[kTiles - 1], last_tile + offset);
}

// Multiplies the group in registers (count blocks) and loads the next one into the same registers, block by block.
// kFp8: blocks are half blocks of the shared expert. kWhole: both groups have kGroupBlocks blocks, of the same kind.
template <class Traits, int kTiles, int kChains, bool kFp8, bool kWhole>
__device__ __forceinline__ void stream_group(StreamWeights<Traits>& w, StreamCursor<Traits>& next, int next_count,
                                             int count, uint32_t rows_address, uint32_t last_tile,
                                             float (&sum)[kChains][kTiles][4]) {
  constexpr int kAhead = kTiles <= 2 ? 1 : 0;  // halves that rows are fetched ahead
  constexpr int kPerBlock = kFp8 ? 1 : 2, kHalves = kPerBlock * Traits::kGroupBlocks;
  StreamRows<kTiles> rows[kAhead + 1];
  if (kAhead > 0) stream_fetch_rows<Traits, kTiles>(rows[0], rows_address, last_tile, 0);
  static_for<Traits::kGroupBlocks>([&](auto index) {
    constexpr int j = decltype(index)::value;
    if (kWhole || j < count) {
      if constexpr (Traits::kMode == StreamMode::kWeightsOnly) {
        sum[0][0][0] += __uint_as_float(w.codes[j].x ^ w.codes[j].y ^ w.codes[j].z ^ w.codes[j].w ^ w.scales[j / 2]);
      } else {
        const uint32_t scales = w.scales[j / 2] >> (j % 2 * 16);
        const uint32_t sf_low = decode_sf(scales & 0xff), sf_high = decode_sf(scales >> 8 & 0xff);
#pragma unroll
        for (int half = kPerBlock * j; half < kPerBlock * (j + 1); ++half) {
          if (half + kAhead < kHalves)
            stream_fetch_rows<Traits, kTiles>(rows[(half + kAhead) % (kAhead + 1)], rows_address, last_tile,
                                              half + kAhead);
          const StreamRows<kTiles>& b = rows[half % (kAhead + 1)];
          uint32_t a[2][4];
          if constexpr (kFp8)
            decode_fp8_half_block(w.codes[j], w.scales[j / 2], a);
          else
            decode_half_block(half % 2 == 0 ? w.codes[j].x : w.codes[j].y, half % 2 == 0 ? w.codes[j].z : w.codes[j].w,
                              sf_low, sf_high, a);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            ptx::mma_m16n8k16_bf16(sum[0][tile], a[0], b.part[tile].x, b.part[tile].y);
            ptx::mma_m16n8k16_bf16(sum[kChains - 1][tile], a[1], b.part[tile].z, b.part[tile].w);
          }
        }
      }
    }
    if constexpr (Traits::kMode != StreamMode::kMathOnly) {
      if constexpr (kWhole)
        next.template load<j, kFp8>(w);
      else
        next.template load_up_to<j>(w, next_count);
    }
    __syncwarp();  // ptxas would move the loads of all blocks to the end of the group
  });
  if (kWhole)
    next.advance(Traits::kGroupBlocks);
  else if (next_count > 0)
    next.advance(next_count);
}

// h of fc1, slot outputs of fc2.
template <class Traits, int kTiles>
__device__ __forceinline__ void stream_epilogue(const MoeStreamArgs& args, const typename Traits::Shared& shared,
                                                const typename Traits::Task& task, const float (&sum)[kTiles][4],
                                                int warp, int lane) {
  const int strip = task.strip + warp / 4;
  if (strip >= task.strips) return;
  const bool is_shared = Traits::kShared && task.is_shared;
  const int rows = task.rows, first = task.first;
  const int g = lane >> 2, t = lane & 3;
  const float alpha0 = task.alpha[0], alpha1 = task.alpha[1];
  const int column = task.is_fc2 ? moe_fc2_row(strip, warp % 4, g) : moe_fc1_row(strip, warp % 4, g);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile * 8 + 2 * t + i;
      if (row >= rows) continue;
      const int slot = is_shared ? first + row : shared.routing.slots[first + row];  // shared: the token
      if (task.is_fc2) {                                                             // row g + 8 is two columns on
        bf16* out = (is_shared ? args.shared_y : args.slot_y) + static_cast<int64_t>(slot) * args.shape.hidden + column;
        out[0] = encode_bf16(sum[tile][i] * alpha0);
        out[2] = encode_bf16(sum[tile][2 + i] * alpha0);
      } else {
        const float gate = round_bf16(sum[tile][i] * alpha0), up = round_bf16(sum[tile][2 + i] * alpha1);
        bf16* h = is_shared ? args.shared_h + static_cast<int64_t>(slot) * args.shared.inter
                            : args.h + static_cast<int64_t>(slot) * args.shape.inter;
        h[column] = encode_bf16(swiglu(gate, up, is_shared ? 1.0f : shared.routing.rho[slot], args.swiglu_limit));
      }
    }
}

// The CTA's task `index`: its first group is in `w`, `next` stands behind it.
template <class Traits, int kTiles, bool kFp8>
__device__ __forceinline__ void stream_task(const MoeStreamArgs& args, typename Traits::Shared& shared,
                                            const uint8_t* ring, uint32_t index, StreamWeights<Traits>& w,
                                            StreamCursor<Traits>& next, RingPosition<Traits::kStages>& at, int warp,
                                            int lane) {
  const typename Traits::Task& task = shared.tasks[index % Traits::kTaskSlots];
  constexpr int kChains = kTiles == 1 ? 2 : 1;  // one tile alone: half the dependent chain
  float sum[kChains][kTiles][4] = {};
  const uint32_t rows_offset = (lane >> 2) * Traits::kRowPitch + (lane & 3) * 32;
  const bool used = (kTiles - 1) * 8 + (lane >> 2) < task.rows;
  bool last;
  do {
    last = next.left == 0;  // all that is left of this task is in `w`
    if (last) next.begin_task(shared, index + 1, warp, lane);
    const int count = last ? (task.blocks - 1) % Traits::kGroupBlocks + 1 : Traits::kGroupBlocks,
              next_count = min(next.left, Traits::kGroupBlocks);
    const uint32_t rows_address = ptx::smem_address(ring + at.stage * Traits::kStageBytes) + rows_offset;
    const uint32_t last_tile =
        used ? rows_address + (kTiles - 1) * 8 * Traits::kRowPitch : ptx::smem_address(shared.zero_row);
    spin_until([&] { return mbarrier_try_wait_long(&shared.rows_full[at.stage], at.phase); }, "moe stream: token rows",
               task.counter, next.left);
    const bool same_kind = !Traits::kShared || next.is_shared == kFp8;
    if (count == Traits::kGroupBlocks && next_count == Traits::kGroupBlocks && same_kind)
      stream_group<Traits, kTiles, kChains, kFp8, true>(w, next, next_count, count, rows_address, last_tile, sum);
    else
      stream_group<Traits, kTiles, kChains, kFp8, false>(w, next, next_count, count, rows_address, last_tile, sum);
    ptx::mbarrier_arrive(
        &shared.rows_empty
             [at.stage]);  // of every lane that has read: racecheck does not follow a __syncwarp and one arrival
    at.advance();
  } while (!last);
#pragma unroll
  for (int tile = 0; kChains > 1 && tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][tile][i] += sum[1 % kChains][tile][i];
  stream_epilogue<Traits, kTiles>(args, shared, task, sum[0], warp, lane);
}

template <class Traits>
__device__ __forceinline__ void stream_math(const MoeStreamArgs& args, typename Traits::Shared& shared,
                                            const uint8_t* ring) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  StreamWeights<Traits> w = {};
  StreamCursor<Traits> next;
  next.begin_task(shared, 0, warp, lane);
  static_for<Traits::kGroupBlocks>([&](auto block) { next.template load_up_to<decltype(block)::value>(w, next.left); });
  if (next.left > 0) next.advance(min(next.left, Traits::kGroupBlocks));
  RingPosition<Traits::kStages> at;
  for (uint32_t index = 0;; ++index) {
    const typename Traits::Task& task = shared.tasks[index % Traits::kTaskSlots];
    if (task.blocks == 0) return;
    const auto run = [&](auto tiles, auto fp8) {
      stream_task<Traits, decltype(tiles)::value, decltype(fp8)::value>(args, shared, ring, index, w, next, at, warp,
                                                                        lane);
    };
    const int tiles = (task.rows + 7) / 8;
    if (Traits::kShared && task.is_shared) {
      using Fp8 = std::bool_constant<Traits::kShared>;
      if (tiles <= 2)
        run(std::integral_constant<int, 2>(), Fp8());
      else
        run(std::integral_constant<int, 4>(), Fp8());
    } else {
      if (tiles == 1) run(std::integral_constant<int, 1>(), std::false_type());
      if (tiles == 2) run(std::integral_constant<int, 2>(), std::false_type());
      if (tiles == 3) run(std::integral_constant<int, 3>(), std::false_type());
      if (tiles == 4) run(std::integral_constant<int, 4>(), std::false_type());
    }
    ptx::mbarrier_arrive(
        &shared.task_done[index %
                          Traits::kTaskSlots]);  // every lane has read the task: racecheck wants an arrival of each
  }
}

}  // namespace dsv4::sm90
