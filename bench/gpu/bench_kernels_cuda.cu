// Copy and read streams, random fills, and an empty kernel.
#include "bench_kernels.h"
#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu_bench.h"

namespace dsv4::bench {
namespace {

constexpr int kThreads = 256, kUnroll = 4;

__global__ void __launch_bounds__(kThreads) copy_kernel(uint4* to, const uint4* from, int64_t count) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  uint4 v[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (first + i * kThreads < count) v[i] = ptx::load_stream_16(from + first + i * kThreads);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (first + i * kThreads < count) ptx::store_stream_16(to + first + i * kThreads, v[i]);
}

// Each CTA reads one contiguous chunk.
__global__ void __launch_bounds__(512) read_kernel(const uint4* from, int64_t count, uint32_t* sink) {
  const int64_t chunk = (count + gridDim.x - 1) / gridDim.x, end = min(count, (blockIdx.x + 1) * chunk);
  uint32_t sum = 0;
  int64_t i = blockIdx.x * chunk + threadIdx.x;
  for (; i + 7 * 512 < end; i += 8 * 512) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = ptx::load_stream_16(from + i + j * 512);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < end; i += 512) sum ^= ptx::load_stream_16(from + i).x;
  if (sum == 0x12345678u) *sink = sum;
}

__device__ uint32_t hash(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}

enum class Kind { kBytes, kBf16, kF32, kSf };
__global__ void random_kernel(uint32_t* to, int64_t words, uint32_t seed, Kind kind) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t r = hash(static_cast<uint32_t>(i) * 2654435761u + seed);
    if (kind == Kind::kBf16) r = (r & 0x81ff81ffu) | 0x3e003e00u;  // magnitudes 2^-3 .. 2
    if (kind == Kind::kF32) r = (r & 0x81ffffffu) | 0x3e000000u;
    if (kind == Kind::kSf) r = (r & 0x3f3f3f3fu) + 0x20202020u;
    to[i] = r;
  }
}

__global__ void empty_kernel() {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
}

void fill(void* to, int64_t bytes, uint32_t seed, Kind kind, cudaStream_t stream) {
  gpu::launch(random_kernel, {.grid = 1024, .block = 256, .stream = stream}, static_cast<uint32_t*>(to), bytes / 4,
              seed, kind);
}

}  // namespace

void launch_copy(void* to, const void* from, int64_t bytes, const GpuContext& context) {
  const int64_t count = bytes / 16;
  gpu::launch(copy_kernel,
              {.grid = static_cast<uint32_t>((count + kThreads * kUnroll - 1) / (kThreads * kUnroll)),
               .block = kThreads,
               .stream = context.stream},
              static_cast<uint4*>(to), static_cast<const uint4*>(from), count);
}
void launch_read(const void* from, int64_t bytes, uint32_t* sink, const GpuContext& context) {
  gpu::launch(read_kernel, {.grid = static_cast<uint32_t>(4 * context.num_sms), .block = 512, .stream = context.stream},
              static_cast<const uint4*>(from), bytes / 16, sink);
}
void fill_random(void* device, int64_t bytes, uint32_t seed, cudaStream_t stream) {
  fill(device, bytes, seed, Kind::kBytes, stream);
}
void fill_random_bf16(void* device, int64_t count, uint32_t seed, cudaStream_t stream) {
  fill(device, 2 * count, seed, Kind::kBf16, stream);
}
void fill_random_f32(void* device, int64_t count, uint32_t seed, cudaStream_t stream) {
  fill(device, 4 * count, seed, Kind::kF32, stream);
}
void fill_random_sf(void* device, int64_t bytes, uint32_t seed, cudaStream_t stream) {
  fill(device, bytes, seed, Kind::kSf, stream);
}

void launch_empty(const GpuContext& context) {
  gpu::launch(empty_kernel, {.grid = 1, .block = 32, .stream = context.stream, .dependent = context.dependent});
}

}  // namespace dsv4::bench
