// What the machine can do: read streams, a copy, the BF16 matmul (moe_matmul.cpp), and bulk copies into a ring.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "bench_kernels.h"
#include "gpu/device.h"
#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "moe_bench.h"

namespace dsv4::bench {
namespace {

using gpu::DeviceBuffer;

__global__ void read_bytes(const uint4* p, int64_t n, uint32_t* sink) {
  uint32_t v = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const uint4 q = __ldcs(p + i);
    v ^= q.x ^ q.y ^ q.z ^ q.w;
  }
  if (v == 0x12345678u) *sink = v;
}
__global__ void read_chunks(const uint4* p, int64_t n, uint32_t* sink) {  // one contiguous run per block
  const int64_t per = (n + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * per, end = min(n, begin + per);
  uint32_t v = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const uint4 q = __ldcs(p + i);
    v ^= q.x ^ q.y ^ q.z ^ q.w;
  }
  if (v == 0x12345678u) *sink = v;
}

// How fast bulk copies into a ring of shared memory go: `chunk` bytes each, `stages` in flight per thread that copies.
__global__ void __launch_bounds__(128)
    ring_copy(const uint8_t* data, int64_t bytes, int chunk, int stages, int run, int issuers, bool evict_first) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t full[64];
  const int issuer = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages * issuers; ++i) ptx::mbarrier_init(&full[i], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0 || issuer >= issuers) return;
  const int chunks = int(bytes / chunk), self = blockIdx.x * issuers + issuer, all = gridDim.x * issuers;
  // runs of `run` chunks are contiguous and belong to one issuer
  const auto address = [&](int i) { return ((i / run) * all + self) * run + i % run; };
  uint64_t* mine = full + issuer * stages;
  uint8_t* buffer = ring + int64_t(issuer) * stages * chunk;
  const auto issue = [&](int i) {
    const int a = address(i);
    if (a >= chunks) return;
    const int s = i % stages;
    ptx::mbarrier_arrive_expect_tx(&mine[s], chunk);
    if (evict_first)
      ptx::bulk_load(buffer + s * chunk, data + int64_t(a) * chunk, chunk, &mine[s], ptx::L2Hint::kEvictFirst);
    else
      ptx::bulk_load(buffer + s * chunk, data + int64_t(a) * chunk, chunk, &mine[s]);
  };
  for (int i = 0; i < stages; ++i) issue(i);
  for (int i = 0; (i / run) * all * run < chunks; ++i) {
    if (address(i) >= chunks) continue;
    ptx::mbarrier_wait(&mine[i % stages], (i / stages) & 1);
    issue(i + stages);
  }
}

}  // namespace

double moe_median_us(const gpu::Stream& stream, const DeviceBuffer& flush, int copies, int samples, double warm_seconds,
                     const std::function<void(int copy, cudaStream_t)>& body) {
  const gpu::Graph graph = gpu::Graph::capture(stream, [&](cudaStream_t s) {
    for (int i = 0; i < copies; ++i) body(i, s);
  });
  const auto start = std::chrono::steady_clock::now();
  do {
    graph.launch(stream.get());
    stream.synchronize();
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < warm_seconds);
  gpu::Event from, to;
  std::vector<double> times;
  for (int i = 0; i < samples; ++i) {
    read_bytes<<<1056, 256, 0, stream.get()>>>(flush.as<uint4>(), flush.bytes() / 16 - 1, flush.as<uint32_t>());
    from.record(stream.get());
    graph.launch(stream.get());
    to.record(stream.get());
    stream.synchronize();
    times.push_back(gpu::elapsed_us(from, to) / copies);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

MoeCeilings measure_moe_ceilings() {
  MoeCeilings c;
  c.device = gpu::current_device().name;
  gpu::Stream stream;
  try {
    c.matmul_tflops = measure_bf16_matmul(8192, stream, &c.matmul_library);
  } catch (const std::exception& error) {
    c.matmul_library = error.what();  // printed beside the floor, which then has no arithmetic term of this run
  }
  DeviceBuffer data(int64_t{3624} * 1000 * 1000), flush(384 << 20);
  gpu::fill(data.data(), 3, data.bytes(), stream.get());
  gpu::fill(flush.data(), 3, flush.bytes(), stream.get());
  const auto read = [&](int64_t bytes) {
    double best = 1e9;
    for (const int blocks : {528, 1056, 2112}) {
      best = std::min(best, moe_median_us(stream, flush, 1, 20, 0.05, [&](int, cudaStream_t s) {
                        read_bytes<<<blocks, 256, 0, s>>>(data.as<uint4>(), bytes / 16, flush.as<uint32_t>());
                      }));
      best = std::min(best, moe_median_us(stream, flush, 1, 20, 0.05, [&](int, cudaStream_t s) {
                        read_chunks<<<blocks, 512, 0, s>>>(data.as<uint4>(), bytes / 16, flush.as<uint32_t>());
                      }));
    }
    return bytes / best * 1e-3;
  };
  c.read_85mb_gb_s = read(85 * 1000 * 1000);
  c.read_620mb_gb_s = read(620 * 1000 * 1000);
  c.read_gb_s = read(data.bytes());
  const int64_t half = data.bytes() / 2;
  const double engine_us = moe_median_us(stream, flush, 1, 15, 0.05, [&](int, cudaStream_t s) {
    gpu::copy_on_device(data.as<uint8_t>() + half, data.data(), half, s);
  });
  const double kernel_us = moe_median_us(stream, flush, 1, 15, 0.05, [&](int, cudaStream_t s) {
    launch_copy(data.as<uint8_t>() + half, data.data(), half, GpuContext{s});
  });
  c.copy_gb_s = 2.0 * half / std::min(engine_us, kernel_us) * 1e-3;
  return c;
}

int run_moe_copies() {
  gpu::Stream stream;
  DeviceBuffer data(int64_t{2415919104}), flush(384 << 20);
  gpu::fill(data.data(), 3, data.bytes(), stream.get());
  gpu::fill(flush.data(), 3, flush.bytes(), stream.get());
  gpu::allow_smem(ring_copy, 226 * 1024);
  struct Case {
    int chunk, kib, run, issuers, per_sm;
    bool evict;
  };
  for (const Case c :
       {Case{9216, 128, 16, 1, 1, true}, Case{9216, 128, 16, 1, 1, false}, Case{9216, 64, 16, 1, 1, false},
        Case{9216, 200, 16, 1, 1, false}, Case{4608, 128, 32, 1, 1, false}, Case{2304, 128, 64, 1, 1, false},
        Case{18432, 200, 8, 1, 1, false}, Case{9216, 200, 16, 2, 1, false}, Case{4608, 200, 32, 4, 1, false},
        Case{9216, 100, 16, 1, 2, false}, Case{4608, 100, 32, 1, 2, false}, Case{9216, 200, 1, 1, 1, false},
        Case{2048, 128, 72, 1, 1, false}, Case{8192, 200, 18, 1, 1, false}, Case{9216, 200, 256, 1, 1, false}}) {
    const int stages = std::min(64 / c.issuers, c.kib * 1024 / c.chunk / c.issuers);
    for (const int64_t bytes : {int64_t{621} << 20, data.bytes()}) {
      const double us = moe_median_us(stream, flush, 1, 15, 0.03, [&](int, cudaStream_t s) {
        ring_copy<<<132 * c.per_sm, 128, c.per_sm == 1 ? 220 * 1024 : 105 * 1024, s>>>(
            data.as<uint8_t>(), bytes, c.chunk, stages, c.run, c.issuers, c.evict);
      });
      printf("ring copy chunk %5d in flight %3d KiB run %3d issuers %d CTAs/SM %d %s: %4lld MB %7.1f us %5.0f GB/s\n",
             c.chunk, stages * c.issuers * c.chunk * c.per_sm / 1024, c.run, c.issuers, c.per_sm,
             c.evict ? "evict-first" : "normal     ", (long long)(bytes >> 20), us, bytes / us * 1e-3);
    }
  }
  return 0;
}

}  // namespace dsv4::bench
