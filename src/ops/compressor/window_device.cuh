// compress_quantize: what the threads of one window do. A thread pools eight slots of four channels; slot groups are merged by shuffles, then
// in shared memory. The threads that end up with the channels normalise, rotate and encode them where they are: the only exchange left is the
// norm's sum (HCA: one round of asynchronous stores between the CTAs of a cluster).
#pragma once

#include "gpu/ptx/sync.cuh"
#include "ops/compressor/compressor_gpu.h"
#include "ops/compressor/kv_quad_device.cuh"
#include "ops/quantize/kv_row_device.cuh"

namespace dsv4::compress_window {

template <CompressorKind kKind_>
struct Traits {
  static constexpr CompressorKind kKind = kKind_;
  static constexpr CompressorTraits kShape = compressor_traits(kKind);
  static constexpr bool kOverlap = kKind != CompressorKind::kHca;
  static constexpr int kSlots = kOverlap ? 2 * kShape.ratio : kShape.ratio;
  static constexpr int kSlotsPerThread = 8;
  static constexpr int kGroups = kSlots / kSlotsPerThread;  // 1, HCA 16
  static constexpr int kClusterCtas = kKind == CompressorKind::kHca ? 8 : 1;
  static constexpr int kChannels = kShape.dim / kClusterCtas;  // of one CTA
  static constexpr int kLanes = kChannels / 4;                 // threads across the channels
  static constexpr int kThreads = kLanes * kGroups, kWarps = kThreads / 32;
  static constexpr int kActiveWarps = (kLanes + 31) / 32;  // that hold finished channels
  static constexpr int kHalves = kOverlap ? 2 : 1;
  static constexpr int kTokenPieces =
      (kLanes * kHalves + kThreads - 1) / kThreads;  // of a token, four channels each, a thread stores
  // Of one window; a CTA with several takes two in turn: a CTA writes into another's exchange of window n + 2 after it has
  // everybody's sums of n + 1, sent after those of n were read.
  struct Exchange {
    alignas(8) uint64_t squares_barrier;
    float square_sums[kClusterCtas];
    float warp_sums[kActiveWarps];
    static constexpr int kParts = kGroups > 1 ? kWarps : 1, kPartLanes = kGroups > 1 ? kLanes : 1;
    float4 max[kParts][kPartLanes], sum[kParts][kPartLanes], weighted[kParts][kPartLanes];
  };
  struct SharedStorage {
    Exchange exchanges[kClusterCtas > 1 ? 2 : 1];
  };
};

// What one CTA (or cluster) works on: a window, and where its tokens are.
struct Window {
  int64_t position;     // decode: the token's; prefill: the window's last
  int64_t first_fresh;  // positions from here on come from value/gate, earlier ones from the state
  const float* value;   // [.., width] of position first_fresh
  const float* gate;
  float* state_value;
  float* state_gate;
  int32_t rope_row, slot;
};

struct Float4 {
  float v[4];
};
__device__ __forceinline__ Float4 load4(const float* pointer) {
  const float4 v = *reinterpret_cast<const float4*>(pointer);
  return {{v.x, v.y, v.z, v.w}};
}
// Past L1, which may hold what an earlier kernel left there: for what is read before the predecessor is done.
__device__ __forceinline__ Float4 load4_l2(const float* pointer) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(pointer));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store4(float* pointer, const Float4& v) {
  *reinterpret_cast<float4*>(pointer) = {v.v[0], v.v[1], v.v[2], v.v[3]};
}

// What a thread writes of a token's projections into its ring row; loaded early, stored when everything else has arrived too.
template <class T>
struct TokenPieces {
  Float4 value[T::kTokenPieces], gate[T::kTokenPieces];
};
template <class T>
__device__ __forceinline__ int piece_channel(int thread, int piece, int first_channel) {
  const int i = thread + piece * T::kThreads;
  return first_channel + i / T::kLanes * T::kShape.dim + i % T::kLanes * 4;
}
template <class T>
__device__ __forceinline__ bool has_piece(int thread, int piece) {
  return thread + piece * T::kThreads < T::kLanes * T::kHalves;
}
// thread: among those that work on this token.
template <class T>
__device__ __forceinline__ TokenPieces<T> load_token(const CompressCommon& args, const Window& window, int64_t position,
                                                     int first_channel, int thread) {
  TokenPieces<T> pieces{};
#pragma unroll
  for (int i = 0; i < T::kTokenPieces; ++i) {
    if (!has_piece<T>(thread, i)) continue;
    const int c = piece_channel<T>(thread, i, first_channel);
    const int64_t from = (position - window.first_fresh) * T::kShape.width + c;
    pieces.value[i] = load4(window.value + from);
    pieces.gate[i] = load4(window.gate + from);
    const Float4 bias = load4(args.ape + static_cast<uint32_t>(position) % T::kShape.ratio * T::kShape.width + c);
#pragma unroll
    for (int j = 0; j < 4; ++j) pieces.gate[i].v[j] += bias.v[j];
  }
  return pieces;
}
template <class T>
__device__ __forceinline__ void store_token(const Window& window, int64_t position, int first_channel, int thread,
                                            const TokenPieces<T>& pieces) {
#pragma unroll
  for (int i = 0; i < T::kTokenPieces; ++i) {
    if (!has_piece<T>(thread, i)) continue;
    const int64_t to = int64_t{static_cast<uint32_t>(position) % T::kShape.state_rows * T::kShape.width} +
                       piece_channel<T>(thread, i, first_channel);
    store4(window.state_value + to, pieces.value[i]);
    store4(window.state_gate + to, pieces.gate[i]);
  }
}

// e^(x - max) for x <= max, by the hardware's 2^x (2 ulp, nothing below 2^-126 counts); 0 when x is -inf.
__device__ __forceinline__ float exp_below(float x, float max) {
  return x == -INFINITY ? 0.0f : ptx::exp2_approx((x - max) * 1.44269504f);
}

// A slot of the window that ends before window_end.
struct Slot {
  int64_t position;
  int channel;  // of a token's or a ring row's
};
template <class T>
__device__ __forceinline__ Slot slot_at(int64_t window_end, int slot, int channel) {
  return {window_end - T::kSlots + slot, channel + (T::kOverlap && slot >= T::kShape.ratio ? T::kShape.dim : 0)};
}
// Its value and gate, from the projections.
template <class T>
__device__ __forceinline__ void load_fresh(const CompressCommon& args, const Window& window, const Slot& slot,
                                           Float4& value, Float4& gate) {
  const int64_t at = (slot.position - window.first_fresh) * T::kShape.width + slot.channel;
  value = load4(window.value + at);
  gate = load4(window.gate + at);
  const Float4 bias =
      load4(args.ape + static_cast<uint32_t>(slot.position) % T::kShape.ratio * T::kShape.width + slot.channel);
#pragma unroll
  for (int i = 0; i < 4; ++i) gate.v[i] += bias.v[i];
}
// From the state: of the slot that many rows later, if it is wanted and not before the sequence; else what vanishes.
template <class T>
__device__ __forceinline__ void load_kept(const Window& window, const Slot& slot, int rows_later, bool wanted,
                                          Float4& value, Float4& gate) {
  const int64_t at = static_cast<uint32_t>(slot.position) % T::kShape.state_rows * T::kShape.width + slot.channel;
  if (slot.position >= 0 && wanted) {
    value = load4_l2(window.state_value + at + rows_later * T::kShape.width);
    gate = load4_l2(window.state_gate + at + rows_later * T::kShape.width);
  } else {
    value = {};
    gate = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
  }
}

// Softmax pooling under way: of four channels, over some of the window's slots.
struct Pooled {
  Float4 max, sum, weighted;
};

// Another part of the same window's slots comes in. A part without slots has max -inf and sum 0.
__device__ __forceinline__ void merge(Pooled& a, const Pooled& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float max = fmaxf(a.max.v[i], b.max.v[i]), own = exp_below(a.max.v[i], max),
                other = exp_below(b.max.v[i], max);
    a.max.v[i] = max;
    a.sum.v[i] = __fmaf_rn(b.sum.v[i], other, a.sum.v[i] * own);
    a.weighted.v[i] = __fmaf_rn(b.weighted.v[i], other, a.weighted.v[i] * own);
  }
}
__device__ __forceinline__ Pooled from_lane_xor(const Pooled& a, int mask) {
  Pooled b;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    b.max.v[i] = __shfl_xor_sync(0xffffffffu, a.max.v[i], mask);
    b.sum.v[i] = __shfl_xor_sync(0xffffffffu, a.sum.v[i], mask);
    b.weighted.v[i] = __shfl_xor_sync(0xffffffffu, a.weighted.v[i], mask);
  }
  return b;
}

// The pooled channels, in the threads below kLanes (HCA: in both halves of warp 0). await_projections() is called when everything else is
// on its way, loaded() when all has arrived.
template <class T, bool kDecode, class Await, class Loaded>
__device__ __forceinline__ Float4 pool(const CompressCommon& args, const Window& window, int first_channel,
                                       typename T::Exchange& exchange, const Await& await_projections,
                                       const Loaded& loaded) {
  const int lane = threadIdx.x % T::kLanes, group = threadIdx.x / T::kLanes;
  const int channel = first_channel + lane * 4;
  Float4 gates[T::kSlotsPerThread], values[T::kSlotsPerThread];
  if constexpr (kDecode) {  // only the newest token is fresh
    constexpr int kRun = 4, kLast = T::kSlotsPerThread - 1;
    static_assert(T::kShape.ratio % kRun == 0 &&
                  T::kShape.state_rows % kRun == 0);  // a run's ring rows follow each other
#pragma unroll
    for (int first = 0; first < T::kSlotsPerThread; first += kRun) {
      const Slot slot = slot_at<T>(window.position + 1, group * T::kSlotsPerThread + first, channel);
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        load_kept<T>(window, slot, j, slot.position + j < window.position, values[first + j], gates[first + j]);
    }
    await_projections();
    if (group == T::kGroups - 1)
      load_fresh<T>(args, window, slot_at<T>(window.position + 1, T::kSlots - 1, channel), values[kLast], gates[kLast]);
  } else {
#pragma unroll
    for (int j = 0; j < T::kSlotsPerThread; ++j) {
      const Slot slot = slot_at<T>(window.position + 1, group * T::kSlotsPerThread + j, channel);
      if (slot.position < window.first_fresh)
        load_kept<T>(window, slot, 0, true, values[j], gates[j]);
      else
        load_fresh<T>(args, window, slot, values[j], gates[j]);
    }
    await_projections();
  }
  Pooled pooled;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float max = gates[0].v[i];
#pragma unroll
    for (int j = 1; j < T::kSlotsPerThread; ++j) max = fmaxf(max, gates[j].v[i]);
    float sum = 0, weighted = 0;
#pragma unroll
    for (int j = 0; j < T::kSlotsPerThread; ++j) {
      const float e = exp_below(gates[j].v[i], max);
      sum += e;
      weighted = __fmaf_rn(e, values[j].v[i], weighted);
    }
    pooled.max.v[i] = max, pooled.sum.v[i] = sum, pooled.weighted.v[i] = weighted;
  }
  loaded();
  if constexpr (T::kGroups > 1) {
    static_assert(T::kLanes == 16, "a warp holds two groups");
    merge(pooled, from_lane_xor(pooled, 16));
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 < 16) {
      store4(reinterpret_cast<float*>(&exchange.max[warp][lane]), pooled.max);
      store4(reinterpret_cast<float*>(&exchange.sum[warp][lane]), pooled.sum);
      store4(reinterpret_cast<float*>(&exchange.weighted[warp][lane]), pooled.weighted);
    }
    __syncthreads();
    if (warp == 0) {  // each half merges half of the warps' parts
      constexpr int kParts = T::kWarps / 2;
      const int first = group * kParts;
      const auto part = [&](int w) {
        return Pooled{load4(reinterpret_cast<const float*>(&exchange.max[w][lane])),
                      load4(reinterpret_cast<const float*>(&exchange.sum[w][lane])),
                      load4(reinterpret_cast<const float*>(&exchange.weighted[w][lane]))};
      };
      pooled = part(first);
#pragma unroll
      for (int w = 1; w < kParts; ++w) merge(pooled, part(first + w));
      merge(pooled, from_lane_xor(pooled, 16));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) pooled.weighted.v[i] *= ptx::rcp_approx(pooled.sum.v[i]);
  return pooled.weighted;
}

// What the end of a window needs from memory, fetched before the pooling waits for the state.
struct Rotation {
  float2 cos, sin;
};
template <class T>
__device__ __forceinline__ uint2 fetch_norm_weight(const CompressCommon& args, int first_channel) {
  return __ldg(
      reinterpret_cast<const uint2*>(args.norm_weight + first_channel + 4 * static_cast<int>(threadIdx.x % T::kLanes)));
}
template <class T>
__device__ __forceinline__ Rotation fetch_rotation(const CompressCommon& args, const Window& window,
                                                   int first_channel) {
  const int rope_channel = first_channel + 4 * static_cast<int>(threadIdx.x % T::kLanes) - (T::kShape.dim - kKvRopeDim);
  if (rope_channel < 0) return {};
  const float* cosines = args.cos_sin + int64_t{window.rope_row} * kKvRopeDim + rope_channel / 2;
  return {*reinterpret_cast<const float2*>(cosines), *reinterpret_cast<const float2*>(cosines + kKvRopeDim / 2)};
}

// Sum of squares of the whole row; every finishing thread gets it.
template <class T>
__device__ __forceinline__ float row_squares(const Float4& x, typename T::Exchange& exchange, uint32_t parity) {
  float square = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) square = __fmaf_rn(x.v[i], x.v[i], square);
  constexpr int kLanesOfWarp = T::kLanes < 32 ? T::kLanes : 32;
#pragma unroll
  for (int step = kLanesOfWarp / 2; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
  if constexpr (T::kClusterCtas > 1) {
    static_assert(T::kActiveWarps == 1);
    const uint32_t rank = ptx::cluster_cta_rank();
    if (threadIdx.x < T::kClusterCtas)
      ptx::store_async_cluster_f32(ptx::map_to_cta(&exchange.square_sums[rank], threadIdx.x), square,
                                   ptx::map_to_cta(&exchange.squares_barrier, threadIdx.x));
    ptx::mbarrier_wait_cluster(&exchange.squares_barrier, parity);
    square = 0;
#pragma unroll
    for (int r = 0; r < T::kClusterCtas; ++r) square += exchange.square_sums[r];
  } else if constexpr (T::kActiveWarps > 1) {
    if (threadIdx.x % 32 == 0) exchange.warp_sums[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
#pragma unroll
    for (int w = 0; w < T::kActiveWarps; ++w) square += exchange.warp_sums[w];
  }
  return square;
}

// Norm, rotation and rounding of the pooled channels.
template <class T>
__device__ __forceinline__ void finish(const CompressCommon& args, uint2 weight, const Rotation& rotation,
                                       int first_channel, Float4& x, typename T::Exchange& exchange, uint32_t parity) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x.v[i] = round_bf16(x.v[i]);
  const float factor =
      ptx::rsqrt_approx(__fmaf_rn(row_squares<T>(x, exchange, parity), 1.0f / T::kShape.dim, args.rms_eps));
  const float w[4] = {ptx::low_bf16(weight.x), ptx::high_bf16(weight.x), ptx::low_bf16(weight.y),
                      ptx::high_bf16(weight.y)};
#pragma unroll
  for (int i = 0; i < 4; ++i) x.v[i] = round_bf16(w[i] * (x.v[i] * factor));
  if (first_channel + 4 * static_cast<int>(threadIdx.x % T::kLanes) < T::kShape.dim - kKvRopeDim) return;
  const float cosines[2] = {rotation.cos.x, rotation.cos.y}, sines[2] = {rotation.sin.x, rotation.sin.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float cos = cosines[i], sin = sines[i], even = x.v[2 * i], odd = x.v[2 * i + 1];
    x.v[2 * i] = round_bf16(even * cos - odd * sin);
    x.v[2 * i + 1] = round_bf16(even * sin + odd * cos);
  }
}

// Hadamard rotation of 128 channels, four a lane, in the order of indexer_cpu.cpp: the same bits.
__device__ __forceinline__ void hadamard128(float (&x)[4]) {
  const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], step);
      x[i] = threadIdx.x & step ? other - x[i] : x[i] + other;
    }
  const float factor = __frcp_rn(__fsqrt_rn(static_cast<float>(kIndexKeyDim)));
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= factor;
}

// A window's row. turn: how many this CTA has done before.
template <class T, bool kDecode, class Await, class Loaded>
__device__ __forceinline__ void emit(const CompressCommon& args, const Window& window, int first_channel,
                                     uint2 norm_weight, uint32_t turn, typename T::SharedStorage& shared,
                                     const Await& await_projections, const Loaded& loaded) {
  auto& exchange = shared.exchanges[T::kClusterCtas > 1 ? turn % 2 : 0];
  if constexpr (T::kClusterCtas > 1) {
    if (turn == 0) {
      if (threadIdx.x == 0) {
        for (auto& each : shared.exchanges) ptx::mbarrier_init(&each.squares_barrier, 1);
        ptx::fence_mbarrier_init();
      }
      __syncwarp();  // racecheck takes the barrier's instructions for those of different lanes
      ptx::cluster_arrive_relaxed();
    }
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(&exchange.squares_barrier, sizeof(exchange.square_sums));
    __syncwarp();
  }
  // Measured: prefill of overlapping windows is 8 % faster with the angles asked for last, everything else slower.
  constexpr bool kRotationFirst = kDecode || !T::kOverlap;
  Rotation rotation;
  if constexpr (kRotationFirst) rotation = fetch_rotation<T>(args, window, first_channel);
  const RowAddress address = row_address(
      args.pages,
      T::kKind == CompressorKind::kIndexer ? index_page_layout(args.index_format) : kv_page_layout(args.kv_format),
      window.slot);
  Float4 x = pool<T, kDecode>(
      args, window, first_channel, exchange,
      [&] {
        if constexpr (!kRotationFirst) rotation = fetch_rotation<T>(args, window, first_channel);
        await_projections();
      },
      loaded);
  if constexpr (T::kClusterCtas > 1)
    if (turn == 0) ptx::cluster_wait();  // every CTA has started: its barriers and memory may be written
  if (threadIdx.x >= 32 * T::kActiveWarps) return;
  finish<T>(args, norm_weight, rotation, first_channel, x, exchange, turn / 2 % 2);
  if (window.slot < 0 || window.slot >= args.pages.num_rows) return;
  if constexpr (T::kKind == CompressorKind::kIndexer) {
    if (args.index_format != IndexFormat::kBf16) hadamard128(x.v);
    write_index_key(address, args.index_format, x.v);
  } else {
    write_kv_quad(address, args.kv_format, first_channel + 4 * static_cast<int>(threadIdx.x % T::kLanes),
                  threadIdx.x < T::kLanes, x.v);
  }
}

}  // namespace dsv4::compress_window
