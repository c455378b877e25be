// Runs CUDA kernels on the CPU, one fiber a thread, so that a kernel's source can be tested where there is no GPU: its arithmetic, its use of
// shuffles, mma, barriers, asynchronous stores between the CTAs of a cluster, and whether it waits for ever. Not its races: fibers take
// turns, and everything asynchronous happens at once. The headers beside this one stand in for src/gpu and are found first.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // of kernels that are only parsed; emulated ones ask ptx::dynamic_smem

namespace emulate {

constexpr int kLanes = 32, kWords = 6;
constexpr size_t kStackBytes = 64 << 10;
using LaneWords = uint64_t[kLanes][kWords];

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};
struct Warp {
  Barrier barrier;
  LaneWords given, taken[2];  // taken: of even and odd generations, because a lane may be one behind
};
struct MemoryBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // still to come
  uint32_t parity = 0;
};
struct Cta;
struct Cluster {
  std::vector<Cta*> ctas;
  Barrier barrier;
};
struct Cta {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* smem = nullptr;
  std::vector<Warp> warps;
  Barrier named[17];  // the last one is __syncthreads
  std::map<uint32_t, MemoryBarrier> memory_barriers;  // by offset in smem
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Cta* cta = nullptr;
  uint32_t thread = 0, block = 0;
  uint64_t cluster_generation = 0;
  bool done = false;
};

struct Machine {
  Fiber* current = nullptr;
  ucontext_t scheduler;
  uint32_t grid = 0, block = 0;
  bool progress = false;
  const std::function<void()>* kernel = nullptr;
};
inline Machine machine;

inline void yield() { swapcontext(&machine.current->context, &machine.scheduler); }
template <class Ready>
void wait_until(const Ready& ready) {
  while (!ready()) yield();
  machine.progress = true;
}
inline void arrive(Barrier& barrier, int count) {
  if (++barrier.arrived == count) barrier.arrived = 0, ++barrier.generation, machine.progress = true;
}
inline void sync(Barrier& barrier, int count) {
  const uint64_t generation = barrier.generation;
  arrive(barrier, count);
  wait_until([&] { return barrier.generation != generation; });
}

// Every lane of the warp gives some words and gets everybody's.
inline const LaneWords& exchange(const uint64_t* words, int count) {
  Warp& warp = machine.current->cta->warps[machine.current->thread / kLanes];
  std::memcpy(warp.given[machine.current->thread % kLanes], words, sizeof(uint64_t) * static_cast<size_t>(count));
  const uint64_t generation = warp.barrier.generation;
  if (warp.barrier.arrived + 1 == kLanes) std::memcpy(warp.taken[generation % 2], warp.given, sizeof warp.given);
  sync(warp.barrier, kLanes);
  return warp.taken[generation % 2];
}

inline void enter_fiber() {
  (*machine.kernel)();
  machine.current->done = machine.progress = true;
  yield();
}

inline std::unique_ptr<Fiber> make_fiber(Cta* cta, uint32_t block, uint32_t thread) {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack.reset(new char[kStackBytes]);
  fiber->cta = cta, fiber->block = block, fiber->thread = thread;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, enter_fiber, 0);
  return fiber;
}

inline void run(uint32_t grid, uint32_t block, int smem_bytes, int cluster_ctas, const std::function<void()>& kernel) {
  machine.grid = grid, machine.block = block, machine.kernel = &kernel;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (uint32_t b = 0; b < grid; ++b) {
    if (b % static_cast<uint32_t>(cluster_ctas) == 0) clusters.push_back(std::make_unique<Cluster>());
    auto cta = std::make_unique<Cta>();
    cta->cluster = clusters.back().get(), cta->rank = b % static_cast<uint32_t>(cluster_ctas);
    cta->memory.reset(new uint8_t[static_cast<size_t>(smem_bytes) + 1024]);
    std::memset(cta->memory.get(), 0xa5, static_cast<size_t>(smem_bytes) + 1024);  // NaNs
    cta->smem = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(cta->memory.get()) + 1023) / 1024 * 1024);
    cta->warps.resize(block / kLanes);
    cta->cluster->ctas.push_back(cta.get());
    for (uint32_t t = 0; t < block; ++t) fibers.push_back(make_fiber(cta.get(), b, t));
    ctas.push_back(std::move(cta));
  }
  for (bool all_done = false; !all_done;) {
    all_done = true, machine.progress = false;
    for (const auto& fiber : fibers) {
      if (fiber->done) continue;
      machine.current = fiber.get();
      swapcontext(&machine.scheduler, &fiber->context);
      all_done = all_done && fiber->done;
    }
    if (!all_done && !machine.progress) throw std::runtime_error("the emulated kernel waits for ever");
  }
}

template <uint32_t (*kValue)()>
struct Coordinate {
  operator uint32_t() const { return kValue(); }
};
inline uint32_t thread() { return machine.current->thread; }
inline uint32_t block() { return machine.current->block; }
inline uint32_t grid() { return machine.grid; }
inline uint32_t block_size() { return machine.block; }

}  // namespace emulate

inline constexpr struct { emulate::Coordinate<emulate::thread> x; } threadIdx;
inline constexpr struct { emulate::Coordinate<emulate::block> x; } blockIdx;
inline constexpr struct { emulate::Coordinate<emulate::grid> x; } gridDim;
inline constexpr struct { emulate::Coordinate<emulate::block_size> x; } blockDim;

using std::isnan;

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = emulate::kLanes) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const emulate::LaneWords& words = emulate::exchange(&word, 1);
  std::memcpy(&value, &words[emulate::thread() % emulate::kLanes / static_cast<uint32_t>(width) * static_cast<uint32_t>(width) + static_cast<uint32_t>(lane % width)][0], sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(emulate::thread() % emulate::kLanes) ^ bits);
}
inline void __syncthreads() { emulate::sync(emulate::machine.current->cta->named[16], static_cast<int>(emulate::machine.block)); }
