// compress_quantize: kernels and launches. Decode: a window that a token completes, a CTA or cluster each, or (HCA, many sequences) clusters that
// share them; prefill: windows, then the state. window_device.cuh has what the threads of a window do.
#include <algorithm>

#include "gpu/launch.h"
#include "ops/compressor/window_device.cuh"

namespace dsv4 {
namespace {

using namespace compress_window;

template <class T>
__device__ __forceinline__ Window decode_window(const CompressDecodeArgs& args, int64_t token, int32_t position,
                                                int32_t state) {
  Window window{};
  window.position = position;
  window.first_fresh = position;  // the token itself is read from the projections, not back from the state
  window.value = args.common.value + token * T::kShape.width;
  window.gate = args.common.gate + token * T::kShape.width;
  const int64_t at = int64_t{state} * T::kShape.state_rows * T::kShape.width;
  window.state_value = args.common.state_value + at;
  window.state_gate = args.common.state_gate + at;
  return window;
}

// early: only the projections are left for after the wait (compressor_gpu.h); for calls that start all at once, because it makes them a
// load that depends on another.
template <class T>
__global__ void __launch_bounds__(T::kThreads) decode_kernel(const CompressDecodeArgs args, const bool early) {
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(ptx::dynamic_smem());
  const int token = static_cast<int>(blockIdx.x / T::kClusterCtas), thread = static_cast<int>(threadIdx.x),
            first_channel = static_cast<int>(blockIdx.x % T::kClusterCtas) * T::kChannels;
  const CompressCommon& common = args.common;
  const auto await = [] {
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
  };
  const auto index = [&](const int32_t* indices) { return early ? __ldcg(indices + token) : indices[token]; };
  const uint2 norm_weight = fetch_norm_weight<T>(common, first_channel);
  if (!early) await();
  const int32_t state = index(args.states);
  Window window = decode_window<T>(args, token, index(args.positions), state);
  window.rope_row = index(args.rope_rows);
  window.slot = index(args.slots);
  TokenPieces<T> pieces;
  if (!early) pieces = load_token<T>(common, window, window.position, first_channel, thread);
  const auto await_projections = [&] {
    if (!early) return;
    await();
    pieces = load_token<T>(common, window, window.position, first_channel, thread);
  };
  const auto store = [&] { store_token<T>(window, window.position, first_channel, thread, pieces); };
  if ((window.position + 1) % T::kShape.ratio == 0) {
    emit<T, true>(common, window, first_channel, norm_weight, 0, shared, await_projections, store);
  } else {
    await_projections();
    store();
  }
}

// Of a kind whose windows are a cluster's work (HCA). One window in 128 tokens completes: no cluster for each token, but as many as run at
// once; each takes a group of tokens at a time, whose projections are stored by a group of threads each, and then their windows in turn.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) decode_cluster_kernel(const CompressDecodeArgs args) {
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(ptx::dynamic_smem());
  static_assert(T::kGroups <= 32 && T::kTokenPieces == 1);
  const int first_channel = static_cast<int>(blockIdx.x % T::kClusterCtas) * T::kChannels,
            lane = static_cast<int>(threadIdx.x % 32), group = static_cast<int>(threadIdx.x) / T::kLanes,
            group_thread = static_cast<int>(threadIdx.x) % T::kLanes;
  const int64_t clusters = gridDim.x / T::kClusterCtas;
  const CompressCommon& common = args.common;
  const uint2 norm_weight = fetch_norm_weight<T>(common, first_channel);
  uint32_t turn = 0;
  for (int64_t first = blockIdx.x / T::kClusterCtas; first < args.num_tokens; first += T::kGroups * clusters) {
    // Lane i has the indices of the pass's token i.
    int32_t position = -1, state = 0, rope_row = 0, slot = 0;
    if (const int64_t token = first + lane * clusters; lane < T::kGroups && token < args.num_tokens)
      position = __ldcg(args.positions + token), state = __ldcg(args.states + token),
      rope_row = __ldcg(args.rope_rows + token), slot = __ldcg(args.slots + token);
    uint32_t windows = __ballot_sync(0xffffffffu, position >= 0 && (position + 1) % T::kShape.ratio == 0);
    const auto window_of = [&](int i) {
      return decode_window<T>(args, first + i * clusters, __shfl_sync(0xffffffffu, position, i),
                              __shfl_sync(0xffffffffu, state, i));
    };
    TokenPieces<T> pieces;
    bool stored = false;
    const auto await_projections = [&] {
      if (stored) return;
      ptx::griddepcontrol_wait();
      ptx::griddepcontrol_launch_dependents();
      if (const Window own = window_of(group); own.position >= 0)
        pieces = load_token<T>(common, own, own.position, first_channel, group_thread);
    };
    const auto store = [&] {
      if (stored) return;
      stored = true;
      if (const Window own = window_of(group); own.position >= 0)
        store_token<T>(own, own.position, first_channel, group_thread, pieces);
    };
    if (windows == 0) {
      await_projections();
      store();
    }
    for (; windows != 0; windows &= windows - 1) {
      const int i = __ffs(static_cast<int>(windows)) - 1;
      Window window = window_of(i);
      window.rope_row = __shfl_sync(0xffffffffu, rope_row, i);
      window.slot = __shfl_sync(0xffffffffu, slot, i);
      emit<T, true>(common, window, first_channel, norm_weight, turn++, shared, await_projections, store);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads) prefill_kernel(const CompressPrefillArgs args) {
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(ptx::dynamic_smem());
  const int index = blockIdx.x / T::kClusterCtas, first_channel = blockIdx.x % T::kClusterCtas * T::kChannels;
  const CompressCommon& common = args.common;
  const uint2 norm_weight = fetch_norm_weight<T>(common, first_channel);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  Window window{};
  window.position = (args.first_position / T::kShape.ratio + index + 1) * T::kShape.ratio - 1;
  window.first_fresh = args.first_position;
  window.value = common.value;
  window.gate = common.gate;
  window.state_value = common.state_value;
  window.state_gate = common.state_gate;
  window.rope_row = args.rope_rows[index];
  window.slot = args.slots[index];
  emit<T, false>(
      common, window, first_channel, norm_weight, 0, shared, [] {}, [] {});
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
  const int64_t position = first + blockIdx.x / T::kClusterCtas;
  const int first_channel = blockIdx.x % T::kClusterCtas * T::kChannels;
  const int thread = static_cast<int>(threadIdx.x);
  store_token<T>(window, position, first_channel, thread,
                 load_token<T>(args.common, window, position, first_channel, thread));
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
gpu::LaunchConfig config_for(int64_t jobs, size_t smem_bytes, const GpuContext& context) {
  return {.grid = static_cast<uint32_t>(jobs * T::kClusterCtas),
          .block = T::kThreads,
          .smem_bytes = static_cast<int>(smem_bytes),
          .stream = context.stream,
          .cluster = T::kClusterCtas,
          .dependent = context.dependent};
}

template <class T>
void run(const CompressDecodeArgs& args, const GpuContext& context) {
  constexpr size_t kSmemBytes = sizeof(typename T::SharedStorage);
  if constexpr (T::kClusterCtas > 1) {
    const int64_t clusters =
        std::max(context.num_sms / T::kClusterCtas, 1);  // twice as many would fit, but start later
    if (args.num_tokens > clusters)
      return gpu::launch(decode_cluster_kernel<T>, config_for<T>(clusters, kSmemBytes, context), args);
  }
  const bool early = T::kClusterCtas > 1 || args.num_tokens <= 2 * context.num_sms;
  gpu::launch(decode_kernel<T>, config_for<T>(args.num_tokens, kSmemBytes, context), args, early);
}

template <class T>
void run(const CompressPrefillArgs& args, const GpuContext& context) {
  const int64_t end = args.first_position + args.num_tokens;
  const int64_t windows = end / T::kShape.ratio - args.first_position / T::kShape.ratio;
  if (windows > 0)
    gpu::launch(prefill_kernel<T>, config_for<T>(windows, sizeof(typename T::SharedStorage), context), args);
  const int64_t first =
      end - args.num_tokens < end - T::kShape.state_rows ? end - T::kShape.state_rows : args.first_position;
  gpu::launch(state_kernel<T>, config_for<T>(end - first, 0, context), args, first);
}

template <class Args>
void dispatch(const Args& args, const GpuContext& context) {
  const CompressCommon& common = args.common;
  DSV4_GPU_REQUIRE("compress_quantize", common.pages.rows_per_page > 0 && common.pages.page_stride % 16 == 0,
                   "page_stride = %lld, rows_per_page = %d", static_cast<long long>(common.pages.page_stride),
                   common.pages.rows_per_page);
  DSV4_GPU_REQUIRE("compress_quantize",
                   common.kind == CompressorKind::kIndexer ? common.index_format != IndexFormat::kF32
                                                           : common.kv_format != KvFormat::kF32,
                   "binary32 rows exist on the CPU only");
  if (args.num_tokens == 0) return;
  switch (common.kind) {
    case CompressorKind::kCsa:
      return run<Traits<CompressorKind::kCsa>>(args, context);
    case CompressorKind::kHca:
      return run<Traits<CompressorKind::kHca>>(args, context);
    case CompressorKind::kIndexer:
      return run<Traits<CompressorKind::kIndexer>>(args, context);
  }
}

}  // namespace

void compress_quantize(const CompressDecodeArgs& args, const GpuContext& context) { dispatch(args, context); }
void compress_quantize(const CompressPrefillArgs& args, const GpuContext& context) { dispatch(args, context); }

void reset_compressor_states(CompressorKind kind, float* state_value, float* state_gate, int64_t num_states,
                             const GpuContext& context) {
  const CompressorTraits traits = compressor_traits(kind);
  gpu::launch(fill_kernel, {.grid = 256, .block = 256, .stream = context.stream, .dependent = context.dependent},
              state_value, state_gate, num_states * traits.state_rows * traits.width);
}

}  // namespace dsv4
