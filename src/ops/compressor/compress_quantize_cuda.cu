// compress_quantize: a thread pools eight slots of four channels; slot groups, then CTAs of a cluster, are merged in shared memory.
#include "gpu/launch.h"
#include "gpu/ptx/sync.cuh"
#include "ops/compressor/compressor_gpu.h"
#include "ops/quantize/kv_row_device.cuh"

namespace dsv4 {
namespace {

template <CompressorKind kKind_>
struct Traits {
  static constexpr CompressorKind kKind = kKind_;
  static constexpr CompressorTraits kShape = compressor_traits(kKind);
  static constexpr bool kOverlap = kKind != CompressorKind::kHca;
  static constexpr int kSlots = kOverlap ? 2 * kShape.ratio : kShape.ratio;
  static constexpr int kBatch = 8;                                              // slots a thread loads at once
  static constexpr int kSlotsPerThread = kOverlap ? 8 : 16;
  static constexpr int kGroups = kSlots / kSlotsPerThread;                      // 1, HCA 8
  static constexpr int kClusterCtas = kKind == CompressorKind::kHca ? 8 : 1;
  static constexpr int kChannels = kShape.dim / kClusterCtas;                   // of one CTA
  static constexpr int kLanes = kChannels / 4;                                  // threads across the channels
  static constexpr int kThreads = kLanes * kGroups;
  struct SharedStorage {
    alignas(16) float row[kShape.dim];  // in the cluster's first CTA: the finished row
    float4 max[kGroups][kLanes], sum[kGroups][kLanes], weighted[kGroups][kLanes];
    double square_sums[kClusterCtas];
    double warp_sums[32];
  };
};

// What one CTA (or cluster) works on: a window, and where its tokens are.
struct Window {
  int64_t position;        // decode: the token's; prefill: the window's last
  int64_t first_fresh;     // positions from here on come from value/gate, earlier ones from the state
  const float* value;      // [.., width] of position first_fresh
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
__device__ __forceinline__ void store4(float* pointer, const Float4& v) { *reinterpret_cast<float4*>(pointer) = {v.v[0], v.v[1], v.v[2], v.v[3]}; }

// Writes a token's projections into its ring row; channels [first, first + 4 * threads) of both halves.
template <class T>
__device__ __forceinline__ void store_token(const CompressCommon& args, const Window& window, int64_t position, int first_channel, int thread, int num_threads) {
  constexpr int kHalves = T::kOverlap ? 2 : 1;
  const int64_t from = (position - window.first_fresh) * T::kShape.width, to = position % T::kShape.state_rows * T::kShape.width;
  const float* ape = args.ape + position % T::kShape.ratio * T::kShape.width;
  for (int i = thread; i < T::kLanes * kHalves; i += num_threads) {
    const int c = first_channel + i / T::kLanes * T::kShape.dim + i % T::kLanes * 4;
    store4(window.state_value + to + c, load4(window.value + from + c));
    Float4 gate = load4(window.gate + from + c);
    const Float4 bias = load4(ape + c);
#pragma unroll
    for (int j = 0; j < 4; ++j) gate.v[j] += bias.v[j];
    store4(window.state_gate + to + c, gate);
  }
}

// e^(x - max) for x <= max, by the hardware's 2^x (2 ulp, nothing below 2^-126 counts); 0 when x is -inf.
__device__ __forceinline__ float exp_below(float x, float max) { return x == -INFINITY ? 0.0f : ptx::exp2_approx((x - max) * 1.44269504f); }

// Value and gate of a slot of the window that ends before window_end.
template <class T>
__device__ __forceinline__ void load_slot(const CompressCommon& args, const Window& window, int64_t window_end, int slot, int channel, Float4& value, Float4& gate) {
  const int64_t position = window_end - T::kSlots + slot;
  const int c = channel + (T::kOverlap && slot >= T::kShape.ratio ? T::kShape.dim : 0);
  if (position >= window.first_fresh) {
    const int64_t at = (position - window.first_fresh) * T::kShape.width + c;
    value = load4(window.value + at);
    gate = load4(window.gate + at);
    const Float4 bias = load4(args.ape + static_cast<uint32_t>(position) % T::kShape.ratio * T::kShape.width + c);
#pragma unroll
    for (int i = 0; i < 4; ++i) gate.v[i] += bias.v[i];
  } else if (position >= 0) {
    const int64_t at = static_cast<uint32_t>(position) % T::kShape.state_rows * T::kShape.width + c;
    value = load4(window.state_value + at);
    gate = load4(window.state_gate + at);
  } else {  // before the sequence: vanishes
    value = {};
    gate = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
  }
}

// Softmax pooling of the window's slots for this thread's four channels; the result is in the threads of slot group 0.
template <class T>
__device__ __forceinline__ Float4 pool(const CompressCommon& args, const Window& window, int first_channel, typename T::SharedStorage& shared) {
  const int lane = threadIdx.x % T::kLanes, group = threadIdx.x / T::kLanes;
  const int channel = first_channel + lane * 4;
  const int64_t window_end = window.position + 1;
  Float4 max = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}}, sum = {}, weighted = {};
  constexpr int kBatches = T::kSlotsPerThread / T::kBatch;
  Float4 gates[T::kBatch], values[T::kBatch], next_gates[T::kBatch], next_values[T::kBatch];
#pragma unroll
  for (int j = 0; j < T::kBatch; ++j) load_slot<T>(args, window, window_end, group * T::kSlotsPerThread + j, channel, values[j], gates[j]);
#pragma unroll
  for (int batch = 0; batch < kBatches; ++batch) {
    if (batch + 1 < kBatches)
#pragma unroll
      for (int j = 0; j < T::kBatch; ++j)
        load_slot<T>(args, window, window_end, group * T::kSlotsPerThread + (batch + 1) * T::kBatch + j, channel, next_values[j], next_gates[j]);
    Float4 new_max = max;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < T::kBatch; ++j) new_max.v[i] = fmaxf(new_max.v[i], gates[j].v[i]);
      const float factor = exp_below(max.v[i], new_max.v[i]);
      sum.v[i] *= factor;
      weighted.v[i] *= factor;
#pragma unroll
      for (int j = 0; j < T::kBatch; ++j) {
        const float e = exp_below(gates[j].v[i], new_max.v[i]);
        sum.v[i] += e;
        weighted.v[i] = __fmaf_rn(e, values[j].v[i], weighted.v[i]);
      }
    }
    max = new_max;
#pragma unroll
    for (int j = 0; j < T::kBatch; ++j) gates[j] = next_gates[j], values[j] = next_values[j];
  }
  if constexpr (T::kGroups > 1) {
    store4(reinterpret_cast<float*>(&shared.max[group][lane]), max);
    store4(reinterpret_cast<float*>(&shared.sum[group][lane]), sum);
    store4(reinterpret_cast<float*>(&shared.weighted[group][lane]), weighted);
    __syncthreads();
    if (group == 0) {
      Float4 total = max;
      for (int g = 1; g < T::kGroups; ++g)
#pragma unroll
        for (int i = 0; i < 4; ++i) total.v[i] = fmaxf(total.v[i], reinterpret_cast<const float*>(&shared.max[g][lane])[i]);
      Float4 s = {}, w = {};
      for (int g = 0; g < T::kGroups; ++g)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float m = reinterpret_cast<const float*>(&shared.max[g][lane])[i];
          const float factor = exp_below(m, total.v[i]);
          s.v[i] = __fmaf_rn(reinterpret_cast<const float*>(&shared.sum[g][lane])[i], factor, s.v[i]);
          w.v[i] = __fmaf_rn(reinterpret_cast<const float*>(&shared.weighted[g][lane])[i], factor, w.v[i]);
        }
      sum = s, weighted = w;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) weighted.v[i] *= ptx::rcp_approx(sum.v[i]);
  return weighted;
}

// What finish() needs from memory, fetched before the pooling waits for the state.
struct FinishOperands {
  uint2 weight;
  float2 cos, sin;
};
template <class T>
__device__ __forceinline__ FinishOperands fetch_finish_operands(const CompressCommon& args, const Window& window, int first_channel) {
  FinishOperands operands{};
  if (threadIdx.x >= T::kLanes) return operands;
  const int channel = first_channel + 4 * static_cast<int>(threadIdx.x), rope_channel = channel - (T::kShape.dim - kKvRopeDim);
  operands.weight = __ldg(reinterpret_cast<const uint2*>(args.norm_weight + channel));
  if (rope_channel >= 0) {
    const float* cosines = args.cos_sin + int64_t{window.rope_row} * kKvRopeDim + rope_channel / 2;
    operands.cos = *reinterpret_cast<const float2*>(cosines);
    operands.sin = *reinterpret_cast<const float2*>(cosines + kKvRopeDim / 2);
  }
  return operands;
}

// Norm, rotation and rounding of the pooled channels; the row ends up in the first CTA's shared.row.
template <class T>
__device__ __forceinline__ void finish(const CompressCommon& args, const FinishOperands& operands, int first_channel, Float4 x, typename T::SharedStorage& shared) {
  const uint32_t rank = T::kClusterCtas > 1 ? ptx::cluster_cta_rank() : 0;
  const bool active = threadIdx.x < T::kLanes;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.v[i] = round_bf16(x.v[i]);
  double square = 0;
  if (active)
#pragma unroll
    for (int i = 0; i < 4; ++i) square = __fma_rn(static_cast<double>(x.v[i]), static_cast<double>(x.v[i]), square);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
  if (threadIdx.x % 32 == 0) shared.warp_sums[threadIdx.x / 32] = square;
  __syncthreads();
  constexpr int kActiveWarps = (T::kLanes + 31) / 32;
  double total = 0;
  if constexpr (T::kClusterCtas > 1) {
    ptx::cluster_wait();  // every CTA has started: its shared memory may be written
    if (threadIdx.x < T::kClusterCtas) {
      double own = 0;
      for (int w = 0; w < kActiveWarps; ++w) own += shared.warp_sums[w];
      const uint32_t at = ptx::map_to_cta(&shared.square_sums[rank], threadIdx.x);
      ptx::store_cluster_f64(at, own);
    }
    ptx::cluster_sync();
    for (int r = 0; r < T::kClusterCtas; ++r) total += shared.square_sums[r];
  } else {
    for (int w = 0; w < kActiveWarps; ++w) total += shared.warp_sums[w];
  }
  if (active) {
    const float factor = __frcp_rn(__fsqrt_rn(static_cast<float>(total) / static_cast<float>(T::kShape.dim) + args.rms_eps));
    const int channel = first_channel + 4 * static_cast<int>(threadIdx.x);
    const uint2 weight = operands.weight;
    const float w[4] = {ptx::low_bf16(weight.x), ptx::high_bf16(weight.x), ptx::low_bf16(weight.y), ptx::high_bf16(weight.y)};
#pragma unroll
    for (int i = 0; i < 4; ++i) x.v[i] = round_bf16(w[i] * (x.v[i] * factor));
    const int rope_channel = channel - (T::kShape.dim - kKvRopeDim);
    if (rope_channel >= 0) {
      const float cosines[2] = {operands.cos.x, operands.cos.y}, sines[2] = {operands.sin.x, operands.sin.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float cos = cosines[i], sin = sines[i], even = x.v[2 * i], odd = x.v[2 * i + 1];
        x.v[2 * i] = round_bf16(even * cos - odd * sin);
        x.v[2 * i + 1] = round_bf16(even * sin + odd * cos);
      }
    }
    if constexpr (T::kClusterCtas > 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::store_cluster_f32(ptx::map_to_cta(&shared.row[channel + i], 0), x.v[i]);
    } else {
      store4(&shared.row[channel], x);
    }
  }
  if constexpr (T::kClusterCtas > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
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

template <class T>
__device__ __forceinline__ void write_row(const CompressCommon& args, const RowAddress& address, int32_t slot, typename T::SharedStorage& shared) {
  if (threadIdx.x >= 32 || (T::kClusterCtas > 1 && ptx::cluster_cta_rank() != 0)) return;
  if (slot < 0 || slot >= args.pages.num_rows) return;
  const uint32_t lane = threadIdx.x;
  if constexpr (T::kKind == CompressorKind::kIndexer) {
    float x[4] = {shared.row[4 * lane], shared.row[4 * lane + 1], shared.row[4 * lane + 2], shared.row[4 * lane + 3]};
    if (args.index_format != IndexFormat::kBf16) hadamard128(x);
    write_index_key(address, args.index_format, x);
  } else {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = shared.row[16 * lane + i];
    write_kv_row(address, args.kv_format, x);
  }
}

template <class T>
__device__ __forceinline__ void emit(const CompressCommon& args, const Window& window, int first_channel, typename T::SharedStorage& shared) {
  if constexpr (T::kClusterCtas > 1) ptx::cluster_arrive();
  const FinishOperands operands = fetch_finish_operands<T>(args, window, first_channel);
  const RowAddress address =
      row_address(args.pages, T::kKind == CompressorKind::kIndexer ? index_page_layout(args.index_format) : kv_page_layout(args.kv_format), window.slot);
  const Float4 pooled = pool<T>(args, window, first_channel, shared);
  finish<T>(args, operands, first_channel, pooled, shared);
  write_row<T>(args, address, window.slot, shared);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads) decode_kernel(const CompressDecodeArgs args) {
  __shared__ typename T::SharedStorage shared;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int token = blockIdx.x / T::kClusterCtas, first_channel = blockIdx.x % T::kClusterCtas * T::kChannels;
  const CompressCommon& common = args.common;
  const int64_t state = int64_t{args.states[token]} * T::kShape.state_rows * T::kShape.width;
  Window window{};
  window.position = args.positions[token];
  window.rope_row = args.rope_rows[token];
  window.slot = args.slots[token];
  window.first_fresh = window.position;  // this token itself is read from the projections, not back from the state
  window.value = common.value + int64_t{token} * T::kShape.width;
  window.gate = common.gate + int64_t{token} * T::kShape.width;
  window.state_value = common.state_value + state;
  window.state_gate = common.state_gate + state;
  if ((window.position + 1) % T::kShape.ratio == 0) emit<T>(common, window, first_channel, shared);  // the whole cluster
  // Last, because barriers would wait for these stores; the pooling takes this token from the projections.
  store_token<T>(common, window, window.position, first_channel, static_cast<int>(threadIdx.x), T::kThreads);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads) prefill_kernel(const CompressPrefillArgs args) {
  __shared__ typename T::SharedStorage shared;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int index = blockIdx.x / T::kClusterCtas, first_channel = blockIdx.x % T::kClusterCtas * T::kChannels;
  const CompressCommon& common = args.common;
  Window window{};
  window.position = (args.first_position / T::kShape.ratio + index + 1) * T::kShape.ratio - 1;
  window.first_fresh = args.first_position;
  window.value = common.value;
  window.gate = common.gate;
  window.state_value = common.state_value;
  window.state_gate = common.state_gate;
  window.rope_row = args.rope_rows[index];
  window.slot = args.slots[index];
  emit<T>(common, window, first_channel, shared);
}

// After the windows: the last tokens of the chunk go into the ring. One CTA per token and part of the channels.
template <class T>
__global__ void __launch_bounds__(T::kThreads) state_kernel(const CompressPrefillArgs args, int64_t first) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  Window window{};
  window.first_fresh = args.first_position;
  window.value = args.common.value;
  window.gate = args.common.gate;
  window.state_value = args.common.state_value;
  window.state_gate = args.common.state_gate;
  store_token<T>(args.common, window, first + blockIdx.x / T::kClusterCtas, blockIdx.x % T::kClusterCtas * T::kChannels, static_cast<int>(threadIdx.x), T::kThreads);
}

__global__ void fill_kernel(float* values, float* gates, int64_t count) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    values[i] = 0.0f;
    gates[i] = -INFINITY;
  }
}

template <class T>
gpu::LaunchConfig config_for(int64_t jobs, const GpuContext& context) {
  return {.grid = static_cast<uint32_t>(jobs * T::kClusterCtas), .block = T::kThreads, .stream = context.stream, .cluster = T::kClusterCtas, .dependent = context.dependent};
}

template <class T>
void run(const CompressDecodeArgs& args, const GpuContext& context) {
  gpu::launch(decode_kernel<T>, config_for<T>(args.num_tokens, context), args);
}

template <class T>
void run(const CompressPrefillArgs& args, const GpuContext& context) {
  const int64_t end = args.first_position + args.num_tokens;
  const int64_t windows = end / T::kShape.ratio - args.first_position / T::kShape.ratio;
  if (windows > 0) gpu::launch(prefill_kernel<T>, config_for<T>(windows, context), args);
  const int64_t first = end - args.num_tokens < end - T::kShape.state_rows ? end - T::kShape.state_rows : args.first_position;
  gpu::launch(state_kernel<T>, config_for<T>(end - first, context), args, first);
}

template <class Args>
void dispatch(const Args& args, const GpuContext& context) {
  const CompressCommon& common = args.common;
  DSV4_GPU_REQUIRE("compress_quantize", common.pages.rows_per_page > 0 && common.pages.page_stride % 16 == 0, "page_stride = %lld, rows_per_page = %d",
                   static_cast<long long>(common.pages.page_stride), common.pages.rows_per_page);
  DSV4_GPU_REQUIRE("compress_quantize", common.kind == CompressorKind::kIndexer ? common.index_format != IndexFormat::kF32 : common.kv_format != KvFormat::kF32,
                   "binary32 rows exist on the CPU only");
  if (args.num_tokens == 0) return;
  switch (common.kind) {
    case CompressorKind::kCsa: return run<Traits<CompressorKind::kCsa>>(args, context);
    case CompressorKind::kHca: return run<Traits<CompressorKind::kHca>>(args, context);
    case CompressorKind::kIndexer: return run<Traits<CompressorKind::kIndexer>>(args, context);
  }
}

}  // namespace

void compress_quantize(const CompressDecodeArgs& args, const GpuContext& context) { dispatch(args, context); }
void compress_quantize(const CompressPrefillArgs& args, const GpuContext& context) { dispatch(args, context); }

void reset_compressor_states(CompressorKind kind, float* state_value, float* state_gate, int64_t num_states, const GpuContext& context) {
  const CompressorTraits traits = compressor_traits(kind);
  gpu::launch(fill_kernel, {.grid = 256, .block = 256, .stream = context.stream, .dependent = context.dependent}, state_value, state_gate,
              num_states * traits.state_rows * traits.width);
}

}  // namespace dsv4
