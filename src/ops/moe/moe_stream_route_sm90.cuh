// What the two one-launch kernels share: routing by every CTA for itself, and the matrix instruction.
#pragma once

#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/mma.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/ring.cuh"
#include "gpu/sm90/spin.cuh"
#include "ops/moe/moe_decode_fp8_sm90.cuh"
#include "ops/moe/moe_decode_sm90.cuh"
#include "ops/moe/moe_shared_sm90.h"
#include "ops/moe/moe_sm90.h"
#include "ops/moe/swiglu.h"

namespace dsv4::sm90 {

// For the bench, what limits the kernel: the same copies and no arithmetic, or the same arithmetic and no weight copies.
enum class StreamMode { kFull, kWeightsOnly, kMathOnly };

// The shared expert's weights depend on nothing, so they are on their way into L2 while the routing runs and, in a chain of
// launches, while the kernel before ends: every CTA asks for its part of them. Called by one warp, before any wait.
__device__ __forceinline__ void prefetch_shared(const MoeStreamArgs& args) {
  const int64_t part = blockIdx.x * 32 + threadIdx.x % 32, parts = gridDim.x * 32;
  const auto prefetch = [&](const uint8_t* from, int64_t bytes) {
    const int64_t each = (bytes / 16 + parts - 1) / parts * 16, begin = part * each;
    if (begin < bytes) ptx::bulk_prefetch_l2(from + begin, static_cast<uint32_t>(min(each, bytes - begin)));
  };
  prefetch(args.shared.fc1, moe_shared_fc1_bytes(args.shape.hidden, args.shared.inter));
  prefetch(args.shared.fc2, moe_shared_fc2_bytes(args.shape.hidden, args.shared.inter));
}

// What routing finds, in shared memory. A chunk: up to kMaxRows slots of one expert.
template <int kMaxSlots>
struct RoutedSlots {
  float rho[kMaxSlots];
  uint16_t slots[kMaxSlots];  // sorted by expert, then token
  uint8_t order[kMaxSlots];   // per token: its topk positions by expert id
  uint16_t chunk_expert[kMaxSlots];
  uint16_t chunk_first[kMaxSlots];  // in slots
  uint16_t chunk_rows[kMaxSlots];
};

// Sorts the slots by expert into chunks of at most kMaxRows rows. Every CTA does this for itself and finds the same. Counts
// live in `scratch` (kRouteScratch bytes, the ring before its use). Latency counts here: every weight waits for it. A warp ranks the slots of
// its own stretch, then ranks are offset by the warps before.
template <class Traits>
constexpr int kRouteScratch = Traits::kMaxSlots * 4 + 128 + Traits::kThreads / 32 * kMoeMaxExperts * 2;
template <class Traits>
__device__ __forceinline__ void stream_route(const MoeStreamArgs& args, typename Traits::Shared& shared, int* scratch) {
  constexpr int kWarps = Traits::kThreads / 32,
                kMaxRounds = (Traits::kMaxSlots + Traits::kThreads - 1) / Traits::kThreads;
  const int num_slots = args.num_tokens * args.shape.num_topk, num_experts = args.shape.num_experts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rounds = (num_slots + Traits::kThreads - 1) / Traits::kThreads, stretch = 32 * rounds;
  const int warps = (num_slots + stretch - 1) / stretch;  // that have slots
  int16_t* expert = reinterpret_cast<int16_t*>(scratch);  // [Traits::kMaxSlots]
  uint16_t* rank =
      reinterpret_cast<uint16_t*>(expert + Traits::kMaxSlots);  // [Traits::kMaxSlots]  within expert and warp
  uint32_t* warp_sums = reinterpret_cast<uint32_t*>(rank + Traits::kMaxSlots);  // [32]
  uint16_t* count = reinterpret_cast<uint16_t*>(warp_sums + 32);  // [warps, num_experts], becomes the first slot

  if (warp < warps) {
    int e[kMaxRounds];
#pragma unroll
    for (int r = 0; r < kMaxRounds; ++r) {
      const int i = warp * stretch + r * 32 + lane;
      e[r] = -1;
      if (r < rounds && i < num_slots) {
        e[r] = args.topk_idx[i];
        shared.routing.rho[i] = args.topk_weights[i];
      }
    }
    uint16_t* own = count + warp * num_experts;
    for (int i = lane; i < num_experts; i += 32) own[i] = 0;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kMaxRounds; ++r) {
      if (r >= rounds) break;
      const int i = warp * stretch + r * 32 + lane;
      if (e[r] < 0 || e[r] >= num_experts) e[r] = -1;
      const uint32_t peers = __match_any_sync(0xffffffffu, e[r]);
      const int before = __popc(peers & ((1u << lane) - 1));
      const int start = e[r] >= 0 ? own[e[r]] : 0;
      __syncwarp();
      if (i < num_slots) {
        expert[i] = static_cast<int16_t>(e[r]);
        rank[i] = static_cast<uint16_t>(start + before);
      }
      if (e[r] >= 0 && before == 0) own[e[r]] = static_cast<uint16_t>(start + __popc(peers));
      __syncwarp();
    }
  }
  __syncthreads();
  uint32_t done = 0;  // slots | chunks << 16 of the experts before this round
  for (int base = 0; base < num_experts; base += Traits::kThreads) {
    const int e = base + threadIdx.x;
    int n = 0;
    if (e < num_experts)
      for (int w = 0; w < warps; ++w) n += count[w * num_experts + e];
    const int chunks = (n + Traits::kMaxRows - 1) / Traits::kMaxRows;
    const uint32_t own = n | chunks << 16;
    uint32_t sum = own;
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint32_t before = done;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_sums[w];
      done += warp_sums[w];
    }
    before += sum - own;
    if (e < num_experts) {
      int first = before & 0xffff;
      for (int w = 0; w < warps; ++w) {
        const int c = count[w * num_experts + e];
        count[w * num_experts + e] = static_cast<uint16_t>(first);
        first += c;
      }
    }
    for (int j = 0; j < chunks; ++j) {
      const int chunk = (before >> 16) + j;
      shared.routing.chunk_expert[chunk] = static_cast<uint16_t>(e);
      shared.routing.chunk_first[chunk] = static_cast<uint16_t>((before & 0xffff) + j * Traits::kMaxRows);
      shared.routing.chunk_rows[chunk] = static_cast<uint16_t>(min(Traits::kMaxRows, n - j * Traits::kMaxRows));
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) shared.num_chunks = static_cast<int>(done >> 16);
  for (int i = threadIdx.x; i < num_slots; i += Traits::kThreads) {
    const int e = expert[i], token = i / args.shape.num_topk, base = token * args.shape.num_topk, k = i - base;
    if (e >= 0) shared.routing.slots[count[i / stretch * num_experts + e] + rank[i]] = static_cast<uint16_t>(i);
    int place = 0;  // after every position with a smaller expert (ties: smaller k)
    for (int j = 0; j < args.shape.num_topk; ++j) {
      const int other = expert[base + j];
      place += other < e || (other == e && j < k);
    }
    shared.routing.order[base + place] = static_cast<uint8_t>(e < 0 ? 0xff : k);
  }
  __syncthreads();
}

}  // namespace dsv4::sm90
