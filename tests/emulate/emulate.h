// Runs CUDA kernels on the CPU, one fiber a thread, so that a kernel's source can be tested where there is no GPU: its arithmetic, its use of
// shuffles, mma, barriers, asynchronous stores between the CTAs of a cluster, and whether it waits for ever. Of its races only those that
// show when warps run one after the other as far as they get; everything asynchronous happens at once. The headers beside this one stand
// in for src/gpu and are found first.
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
  Barrier named[17];                                  // the last one is __syncthreads
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
  std::vector<std::unique_ptr<Fiber>> fibers;  // as many as a cluster had threads at most; all done between clusters
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
  for (;;) {  // one thread after the other
    (*machine.kernel)();
    machine.current->done = machine.progress = true;
    yield();
  }
}

inline std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack.reset(new char[kStackBytes]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, enter_fiber, 0);
  return fiber;
}

// Runs a warp until all of its threads wait or are done. True: there was something to do.
inline bool run_warp(size_t warp, bool* all_done) {
  for (bool any = false;; any = true) {
    bool done = true;
    machine.progress = false;
    for (size_t i = warp * kLanes; i < (warp + 1) * kLanes; ++i) {
      machine.current = machine.fibers[i].get();
      if (!machine.current->done) swapcontext(&machine.scheduler, &machine.current->context);
      done = done && machine.current->done;
    }
    if (machine.progress) continue;
    *all_done = *all_done && done;
    return any;
  }
}

// The CTAs from first_block on, to their end. A warp goes on until it has to wait, in every other cluster the last warp first: what lacks a
// barrier comes too early in one of them.
inline void run_cluster(uint32_t first_block, uint32_t block, int smem_bytes, int cluster_ctas) {
  Cluster cluster;
  std::vector<std::unique_ptr<Cta>> ctas;
  for (uint32_t rank = 0; rank < static_cast<uint32_t>(cluster_ctas); ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->cluster = &cluster, cta->rank = rank;
    cta->memory.reset(new uint8_t[static_cast<size_t>(smem_bytes) + 1024]);
    std::memset(cta->memory.get(), 0xff, static_cast<size_t>(smem_bytes) + 1024);  // NaNs
    cta->smem = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(cta->memory.get()) + 1023) / 1024 * 1024);
    cta->warps.resize(block / kLanes);
    cluster.ctas.push_back(cta.get());
    for (uint32_t t = 0; t < block; ++t) {
      const size_t index = size_t{rank} * block + t;
      if (index == machine.fibers.size()) machine.fibers.push_back(make_fiber());
      Fiber& fiber = *machine.fibers[index];
      fiber.cta = cta.get(), fiber.block = first_block + rank, fiber.thread = t, fiber.done = false;
    }
    ctas.push_back(std::move(cta));
  }
  const size_t num_warps = static_cast<size_t>(cluster_ctas) * block / kLanes;
  const bool backwards = first_block / static_cast<uint32_t>(cluster_ctas) % 2 == 1;
  for (;;) {
    bool all_done = true, progress = false;
    for (size_t i = 0; i < num_warps; ++i)
      progress = run_warp(backwards ? num_warps - 1 - i : i, &all_done) || progress;
    if (all_done) return;
    if (!progress) {
      machine.fibers.clear();
      throw std::runtime_error("the emulated kernel waits for ever");
    }
  }
}

// One cluster after the other, as a GPU may: clusters never wait for each other.
inline void run(uint32_t grid, uint32_t block, int smem_bytes, int cluster_ctas, const std::function<void()>& kernel) {
  machine.grid = grid, machine.block = block, machine.kernel = &kernel;
  for (uint32_t b = 0; b < grid; b += static_cast<uint32_t>(cluster_ctas))
    run_cluster(b, block, smem_bytes, cluster_ctas);
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
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = emulate::kLanes) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const emulate::LaneWords& words = emulate::exchange(&word, 1);
  std::memcpy(&value,
              &words[emulate::thread() % emulate::kLanes / static_cast<uint32_t>(width) * static_cast<uint32_t>(width) +
                     static_cast<uint32_t>(lane % width)][0],
              sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(emulate::thread() % emulate::kLanes) ^ bits);
}
inline uint32_t __ballot_sync(unsigned, bool value) {
  const uint64_t word = value;
  const emulate::LaneWords& words = emulate::exchange(&word, 1);
  uint32_t bits = 0;
  for (int lane = 0; lane < emulate::kLanes; ++lane) bits |= static_cast<uint32_t>(words[lane][0]) << lane;
  return bits;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline void __syncthreads() {
  emulate::sync(emulate::machine.current->cta->named[16], static_cast<int>(emulate::machine.block));
}
inline void __syncwarp() {
  const emulate::Fiber& fiber = *emulate::machine.current;
  emulate::sync(fiber.cta->warps[fiber.thread / emulate::kLanes].barrier, emulate::kLanes);
}
