// Latencies of atomics tell near from far: they are done at a line's home.
#include <algorithm>
#include <cmath>

#include "gpu/buffer.h"
#include "gpu/l2_sides.h"
#include "gpu/launch.h"
#include "gpu/ptx/sync.cuh"

namespace dsv4::gpu {
namespace {

// Clocks of an atomic on a word already in L2, the least of four.
__device__ uint32_t atomic_latency(uint32_t* word) {
  __shared__ volatile uint32_t sink;
  uint32_t least = UINT32_MAX;
  for (int i = 0; i < 5; ++i) {
    const long long begin = clock64();
    uint32_t value;
    asm volatile("atom.global.add.u32 %0, [%1], 0;" : "=r"(value) : "l"(word) : "memory");
    sink = value;  // the second look at the clock waits for it
    const uint32_t clocks = static_cast<uint32_t>(clock64() - begin);
    if (i > 0) least = min(least, clocks);
  }
  return least;
}

__device__ uint32_t* chunk_word(uint8_t* data, int64_t chunk) {
  return reinterpret_cast<uint32_t*>(data + chunk * kL2ChunkBytes);
}

// One thread an SM. latency [kMaxSms, chunks]; SMs begin at different chunks, so as not to queue.
__global__ void sm_latency_kernel(uint8_t* data, int chunks, uint16_t* latency) {
  const uint32_t sm = ptx::smid();
  if (sm >= SmSides::kMaxSms) return;
  for (int i = 0; i < chunks; ++i) {
    const int chunk = (i + static_cast<int>(sm) * 61) % chunks;
    latency[sm * chunks + chunk] = static_cast<uint16_t>(min(atomic_latency(chunk_word(data, chunk)), 0xffffu));
  }
}

// latency [2, chunks]: from some SM of each side. next [2]: chunks handed out, kPortion at a time.
constexpr int kPortion = 64;
__global__ void chunk_latency_kernel(const SmSides sms, uint8_t* data, int64_t chunks, unsigned long long* next,
                                     uint16_t* latency) {
  const uint32_t side = sms.side(ptx::smid());
  while (true) {
    const int64_t first = static_cast<int64_t>(atomicAdd(&next[side], static_cast<unsigned long long>(kPortion)));
    if (first >= chunks) return;
    for (int64_t chunk = first; chunk < min(first + kPortion, chunks); ++chunk)
      latency[side * chunks + chunk] = static_cast<uint16_t>(min(atomic_latency(chunk_word(data, chunk)), 0xffffu));
  }
}

struct Machine {
  int num_sms = 0, smem_bytes = 0;  // as much shared memory as a CTA can have: one an SM
};
Machine machine() {
  Machine m;
  int device = 0;
  DSV4_CUDA(cudaGetDevice(&device));
  DSV4_CUDA(cudaDeviceGetAttribute(&m.num_sms, cudaDevAttrMultiProcessorCount, device));
  DSV4_CUDA(cudaDeviceGetAttribute(&m.smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  m.smem_bytes -= 1024;  // static
  return m;
}

// Deviations from the mean, scaled to length 1.
std::vector<double> normalised(const uint16_t* values, int count) {
  std::vector<double> v(values, values + count);
  double mean = 0, squares = 0;
  for (double& x : v) mean += (x = std::min(x, 2000.0)) / count;  // one interrupted measurement is not everything
  for (double& x : v) x -= mean, squares += x * x;
  for (double& x : v) x /= std::sqrt(squares) + 1e-9;
  return v;
}

}  // namespace

SmSides find_sm_sides(cudaStream_t stream) {
  constexpr int kChunks = 1024;
  const Machine m = machine();
  SmSides sides;
  if (m.num_sms > SmSides::kMaxSms) return sides;
  DeviceBuffer scratch(kChunks * kL2ChunkBytes), latency(int64_t{SmSides::kMaxSms} * kChunks * 2);
  fill(scratch.data(), 0, scratch.bytes(), stream);
  fill(latency.data(), 0, latency.bytes(), stream);
  allow_smem(sm_latency_kernel, m.smem_bytes);
  launch(sm_latency_kernel, {.grid = static_cast<unsigned>(m.num_sms), .smem_bytes = m.smem_bytes, .stream = stream},
         scratch.as<uint8_t>(), kChunks, latency.as<uint16_t>());
  std::vector<uint16_t> host(static_cast<size_t>(SmSides::kMaxSms) * kChunks);
  copy_to_host(host.data(), latency.data(), latency.bytes(), stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));

  // SMs of one side find the same chunks slow (correlation with SM 0 above 0.9), those of the other find them fast.
  const std::vector<double> first = normalised(host.data(), kChunks);
  int far_sms = 0;
  for (int sm = 0; sm < m.num_sms; ++sm) {
    const std::vector<double> v = normalised(host.data() + static_cast<size_t>(sm) * kChunks, kChunks);
    double correlation = 0;
    for (int i = 0; i < kChunks; ++i) correlation += v[static_cast<size_t>(i)] * first[static_cast<size_t>(i)];
    if (std::fabs(correlation) < 0.5) return SmSides{};
    if (correlation < 0) sides.bits[sm / 32] |= 1u << (sm % 32), ++far_sms;
  }
  if (far_sms * 4 < m.num_sms || far_sms * 4 > m.num_sms * 3) return SmSides{};
  sides.known = true;
  return sides;
}

std::vector<uint8_t> find_chunk_sides(const SmSides& sms, void* data, int64_t chunks, cudaStream_t stream) {
  DSV4_GPU_REQUIRE("find_chunk_sides", reinterpret_cast<uintptr_t>(data) % kL2ChunkBytes == 0,
                   "memory at %p, expected a multiple of %lld", data, static_cast<long long>(kL2ChunkBytes));
  std::vector<uint8_t> sides(static_cast<size_t>(chunks));
  if (!sms.known || chunks == 0) return sides;
  const Machine m = machine();
  DeviceBuffer next(16), latency(2 * chunks * 2);
  fill(next.data(), 0, next.bytes(), stream);
  fill(latency.data(), 0, latency.bytes(), stream);
  allow_smem(chunk_latency_kernel, m.smem_bytes);
  launch(chunk_latency_kernel, {.grid = static_cast<unsigned>(m.num_sms), .smem_bytes = m.smem_bytes, .stream = stream},
         sms, static_cast<uint8_t*>(data), chunks, next.as<unsigned long long>(), latency.as<uint16_t>());
  std::vector<uint16_t> host(static_cast<size_t>(2 * chunks));
  copy_to_host(host.data(), latency.data(), latency.bytes(), stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  // Other work held all SMs of a side: chunks that nobody measured from there.
  if (std::find(host.begin(), host.end(), 0) != host.end()) return sides;
  for (size_t i = 0; i < sides.size(); ++i) sides[i] = host[i] > host[sides.size() + i];
  return sides;
}

}  // namespace dsv4::gpu
