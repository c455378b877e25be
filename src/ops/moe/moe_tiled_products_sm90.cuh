// What a math warpgroup of the tiled tier computes of a task: sums over all of K, by wgmma or mma.sync, and the epilogues of fc1 and fc2.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/mma.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/ring.cuh"
#include "gpu/sm90/spin.cuh"
#include "gpu/sm90/wgmma_rs.cuh"
#include "ops/moe/moe_decode_sm90.cuh"
#include "ops/moe/moe_tiled_memory_sm90.cuh"
#include "ops/quantize/swiglu_device.cuh"

namespace dsv4::sm90 {

// Four 32-bit values per 8x8 matrix of b16: thread (row g, columns 2t, 2t + 1) -> the transposed matrix.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
// A value as it is, but not to be computed anew in every stage to spare its register.
__device__ __forceinline__ uint32_t opaque(uint32_t v) { return __shfl_sync(0xffffffffu, v, threadIdx.x % 32); }
__device__ __forceinline__ uint8_t* opaque(uint8_t* v) {
  return reinterpret_cast<uint8_t*>(__shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(v), threadIdx.x % 32));
}
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

// fc1, a16: two gate/up values per token pair -> h in operand order.
template <int kN>
__device__ __forceinline__ void tiled_finish_fc1(const MoeTiledArgs& args, const TiledTask& task, const float* rho,
                                                 const float* alpha, int strip, const float (&sum)[kN / 2], int warp,
                                                 int lane) {
  const int g = lane >> 2, t = lane & 3, padded = task.padded;
  const float alpha_gate = alpha[0], alpha_up = alpha[1], limit = args.swiglu_limit;
  const int chunk = (strip & 1) * 4 + warp;
  uint8_t* target = reinterpret_cast<uint8_t*>(args.h_rows) +
                    static_cast<int64_t>(task.first_row) * args.shape.inter * 2 +
                    static_cast<int64_t>(strip >> 1) * padded * 128 + g * 128 + ((chunk ^ g) << 4) + t * 4;
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    if (tile * 8 >= padded) break;  // the instance may be wider than the tile
    asm volatile("" ::: "memory");  // one tile at a time: the sums fill the registers
    const float2 weight = *reinterpret_cast<const float2*>(rho + tile * 8 + 2 * t);
    float h[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t rounded = pack_bf16(sum[tile * 4 + i] * alpha_gate, sum[tile * 4 + 2 + i] * alpha_up);
      h[i] = swiglu_device_unlimited(__uint_as_float(rounded << 16), __uint_as_float(rounded & 0xffff0000u),
                                     i ? weight.y : weight.x, limit);
    }
    *reinterpret_cast<uint32_t*>(target + tile * 1024) = transpose_8x8(pack_bf16(h[0], h[1]));
  }
}

// fc1, a4: the same in binary32, of rows with a global scale each.
template <int kN>
__device__ __forceinline__ void tiled_finish_fc1_wide(const MoeTiledArgs& args, const TiledTask& task, const float* rho,
                                                      const float* alpha, int strip, const float (&sum)[kN / 2],
                                                      int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float* target = args.h_wide + static_cast<int64_t>(task.first_row) * args.shape.inter + moe_fc1_row(strip, warp, g);
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    asm volatile("" ::: "memory");
    const int row = i / 2 * 8 + 2 * t + i % 2;
    if (row >= task.rows) continue;
    const float global = args.x_global[task.first_row + row], gate_alpha = alpha[0] * global,
                up_alpha = alpha[1] * global;
    const uint32_t rounded = pack_bf16(sum[i / 2 * 4 + i % 2] * gate_alpha, sum[i / 2 * 4 + 2 + i % 2] * up_alpha);
    target[static_cast<int64_t>(row) * args.shape.inter] = swiglu_device_unlimited(
        __uint_as_float(rounded << 16), __uint_as_float(rounded & 0xffff0000u), rho[row], args.swiglu_limit);
  }
}

// fc2: sums of a warp's 16 rows -> four consecutive columns of a token's slot a thread. kScaled (a4): rows of h have a global scale each.
template <int kN, bool kScaled>
__device__ __forceinline__ void tiled_finish_fc2(const MoeTiledArgs& args, const TiledTask& task, const int32_t* slots,
                                                 float alpha, int strip, const float (&sum)[kN / 2], int warp,
                                                 int lane) {
  const int g = lane >> 2, t = lane & 3, rows = task.rows - g, pitch = args.shape.hidden * 2;
  const uint32_t slot_at = opaque(ptx::smem_address(slots + g));
  uint8_t* target = opaque(reinterpret_cast<uint8_t*>(args.slot_y + strip * 64 + warp * 16 + 4 * t));
  static_for<kN / 8>([&](auto index) {
    constexpr int kTile = decltype(index)::value;
    asm volatile("" ::: "memory");  // one tile at a time: the sums fill the registers
    float scale[2] = {alpha, alpha};
    if constexpr (kScaled) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scale[i] = alpha * args.h_global[task.first_row + min(kTile * 8 + 2 * t + i, task.rows - 1)];
    }
    const float* v = sum + kTile * 4;
    const uint32_t low = transpose_8x8(pack_bf16(v[0] * scale[0], v[1] * scale[1]));
    const uint32_t high = transpose_8x8(pack_bf16(v[2] * scale[0], v[3] * scale[1]));
    if (kTile * 8 < rows)
      ptx::store_global_8(target + static_cast<int64_t>(load_shared_s32<kTile * 32>(slot_at)) * pitch, low, high);
  });
}

struct TiledCodes {  // a thread's share of a 64x64 block
  uint4 words;
  uint32_t sf_low, sf_high;
};
// Of block kBlock of strip kStrip, counted from those whose codes and scales begin at the two addresses for this thread.
template <class T, int kStrip, int kBlock>
__device__ __forceinline__ void fetch_codes(TiledCodes& codes, uint32_t codes_at, uint32_t scales_at) {
  constexpr int kScales = kBlock / 2 * kMoeHalfSlabScaleBytes + kStrip * kMoePairScaleBytes + kBlock % 2 * 2;
  load_shared_16<kStrip * T::kStripCodeBytes + kBlock * kMoeBlockCodeBytes>(codes.words, codes_at);
  codes.sf_low = load_shared_u8<kScales>(scales_at);
  codes.sf_high = load_shared_u8<kScales + 1>(scales_at);
}
// Byte in a stage of this thread's scales of its warpgroup's first strip and block.
template <class T>
__device__ __forceinline__ uint32_t first_scales(int group, int thread) {
  const int strip = group * T::kGroupStrips;
  return T::kCodeBytes + strip / kMoeGroupStrips * (T::kStageBlocks / 2 * kMoeHalfSlabScaleBytes) +
         strip % kMoeGroupStrips * kMoePairScaleBytes + thread * 4;
}

// Sums of 64 weight rows a strip times kN token rows over all of K, by a warpgroup.
template <class T, int kN>
__device__ __forceinline__ void tiled_sums_wgmma(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                                 RingPosition<T::kStages>& at, float (&sum)[T::kGroupStrips][kN / 2],
                                                 int group, int thread) {
  constexpr int kBlocks =
      T::kStageBlocks * T::kGroupStrips;  // of this warpgroup in a stage: strips of one column after another
  constexpr bool kEarly =
      kN <= 104;  // the next stage's first codes are fetched while products run; to 120 is no faster
  // Blocks that drain together, where there are registers for the fragments of two (to 48 rows: C7512).
  constexpr int kTogether = T::kGroupStrips == 2 && kN <= 32 ? 2 : 1;
  const int lane = thread % 32;
  const uint32_t base = ptx::smem_address(&shared), weights = base + T::kWeightsAt;
  const uint32_t codes_at = opaque(weights + group * T::kGroupStrips * T::kStripCodeBytes + thread * 16),
                 scales_at = opaque(weights + first_scales<T>(group, thread));
  const uint32_t rows = opaque(wgmma_descriptor_low(base + kHeaderBytes));
  const uint32_t control = ptx::smem_address(&tiled_control<T>(shared));
  using Control = std::remove_reference_t<decltype(tiled_control<T>(shared))>;
  const bool tells_peer = T::kPaired && lane == 0 && tiled_pair<T>().ctas > 1;
  uint32_t a[2][2][4];
  TiledCodes codes[2];  // in turn
  int stage = at.stage;
  uint32_t phase = at.phase;
  int left = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols;
  uint32_t stage_codes, stage_scales;
  const auto begin_stage = [&] {
    spin_until([&] { return mbarrier_try_wait_long(control + offsetof(Control, full) + stage * 8, phase); },
               "moe tiled: stage filled", left, stage);
    stage_codes = codes_at + stage * T::kWeightBytes, stage_scales = scales_at + stage * T::kWeightBytes;
    fetch_codes<T, 0, 0>(codes[0], stage_codes, stage_scales);
  };
  if (kEarly) begin_stage();
#pragma unroll 1
  for (; left > 0; left -= T::kStageBlocks) {
    if (!kEarly) begin_stage();
    const uint32_t first = uniform(rows + stage * (T::kRowBytes / 16));
    const uint32_t empty = control + offsetof(Control, empty) + stage * 8;
    static_for<kBlocks>([&](auto index) {
      constexpr int i = decltype(index)::value, strip = i % T::kGroupStrips, k = i / T::kGroupStrips;
      constexpr bool kLast = i + 1 == kBlocks;
      const auto fetch_next = [&] {
        fetch_codes<T, (i + 1) % T::kGroupStrips, (i + 1) / T::kGroupStrips>(codes[(i + 1) % 2], stage_codes,
                                                                             stage_scales);
      };
      if constexpr (kEarly && !kLast) fetch_next();
      const TiledCodes& c = codes[i % 2];
      const uint32_t sf_low = decode_sf(c.sf_low), sf_high = decode_sf(c.sf_high);
      const uint4 words = c.words;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        decode_half_block(half ? words.y : words.x, half ? words.w : words.z, sf_low, sf_high, a[half]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          // Adding to all 64 bits is one uniform instruction and no move; to the low half it was three.
          Wgmma<kN>::mma(sum[strip], a[half][step],
                         wgmma_descriptor_of(first) + (k * (T::kBlockPitch / 16) + (half * 2 + step) * 2));
        wgmma_commit();
      }
      if constexpr (kLast) {
        if (++stage == T::kStages) stage = 0, phase ^= 1;
        if (kEarly && left > T::kStageBlocks) begin_stage();
      } else if constexpr (!kEarly) {
        fetch_next();
      }
      // The other warpgroups decode and multiply meanwhile; a pipeline here makes ptxas serialise (C7512).
      if constexpr ((i + 1) % kTogether == 0) wgmma_wait<0>();
    });
    mbarrier_arrive_at(empty);
    if constexpr (T::kPaired) {
      constexpr uint32_t kPeerEmpty = offsetof(Control, peer_empty) - offsetof(Control, empty);
      if (tells_peer) ptx::mbarrier_arrive_cluster(ptx::map_to_cta(empty + kPeerEmpty, tiled_pair<T>().peer()));
    }
  }
  at.stage = stage, at.phase = phase;
}

// The same with mma.sync: below three n8 tiles it takes fewer instructions than wgmma with its descriptors, fences and drains, and
// no warp waits for another.
template <class T, int kN>
__device__ __forceinline__ void tiled_sums_mma(const MoeTiledArgs& args, TiledShared& shared, const TiledTask& task,
                                               RingPosition<T::kStages>& at, float (&sum)[1][kN / 2], int group,
                                               int thread) {
  static_assert(!T::kPaired);
  const int lane = thread % 32;
  const uint32_t weights = ptx::smem_address(tiled_weights<T>(shared, 0));
  const uint32_t codes_at = weights + group * T::kStripCodeBytes + thread * 16,
                 scales_at = weights + first_scales<T>(group, thread);
  const uint32_t rows_at =
      ptx::smem_address(tiled_rows<T>(shared, 0)) + (lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4);
  auto& control = tiled_control<T>(shared);
#pragma unroll 1
  for (int left = (task.is_fc2 ? args.shape.inter : args.shape.hidden) / kMoeBlockCols; left > 0;
       left -= T::kStageBlocks) {
    const uint32_t stage_codes = codes_at + at.stage * T::kWeightBytes,
                   stage_scales = scales_at + at.stage * T::kWeightBytes;
    const uint32_t rows = rows_at + at.stage * T::kRowBytes, far_rows = rows ^ 64;
    spin_until([&] { return mbarrier_try_wait_long(&control.full[at.stage], at.phase); }, "moe tiled: stage filled",
               left, at.stage);
    TiledCodes codes[2];
    uint32_t b[2][kN / 8][8];
    const auto fetch = [&](auto index) {
      constexpr int k = decltype(index)::value;
      fetch_codes<T, 0, k>(codes[k % 2], stage_codes, stage_scales);
      static_for<kN / 8>([&](auto tile) {
        constexpr int kAt = k * T::kBlockPitch + decltype(tile)::value * 1024;
        load_matrix_x4<kAt>(b[k % 2][decltype(tile)::value], rows);
        load_matrix_x4<kAt>(b[k % 2][decltype(tile)::value] + 4, far_rows);
      });
    };
    fetch(std::integral_constant<int, 0>{});
    static_for<T::kStageBlocks>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (k + 1 < T::kStageBlocks) fetch(std::integral_constant<int, k + 1>{});
      const TiledCodes& c = codes[k % 2];
      const uint32_t sf_low = decode_sf(c.sf_low), sf_high = decode_sf(c.sf_high);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        decode_half_block(half ? c.words.y : c.words.x, half ? c.words.w : c.words.z, sf_low, sf_high, a);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int tile = 0; tile < kN / 8; ++tile)
            ptx::mma_m16n8k16_bf16(&sum[0][tile * 4], a[step], b[k % 2][tile][half * 4 + step * 2],
                                   b[k % 2][tile][half * 4 + step * 2 + 1]);
      }
    });
    ptx::mbarrier_arrive(&control.empty[at.stage]);
    at.advance();
  }
}

}  // namespace dsv4::sm90
