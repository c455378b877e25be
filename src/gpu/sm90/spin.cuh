// Waiting on memory between CTAs: acquire loads, release adds, and spin loops that (in debug builds) say what they wait for.
#pragma once

#include <cstdint>
#include <cstdio>

namespace dsv4::sm90 {

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* pointer) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(uint32_t* pointer, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t add_acq_rel(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}
// Orders ordinary and copy-engine accesses to global and shared memory, both ways.
__device__ __forceinline__ void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// One try of an mbarrier phase that may sleep in hardware for up to 10 ms: a warp that waits must not take issue slots from
// warps that decode.
__device__ __forceinline__ bool mbarrier_try_wait_long(uint32_t address, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, 10000000;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(address), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ bool mbarrier_try_wait_long(uint64_t* barrier, uint32_t parity) {
  return mbarrier_try_wait_long(static_cast<uint32_t>(__cvta_generic_to_shared(barrier)), parity);
}

// Spins until ready(). With -DDSV4_SPIN_TIMEOUT=cycles a wait that long prints what, where and two numbers, and traps.
template <class Ready>
__device__ __forceinline__ void spin_until(const Ready& ready, const char* what, int a, int b) {
#ifdef DSV4_SPIN_TIMEOUT
  const long long start = clock64();
  while (!ready()) {
    if (clock64() - start > static_cast<long long>(DSV4_SPIN_TIMEOUT)) {
      printf("timed out waiting for %s (%d, %d): block %d thread %d\n", what, a, b, int(blockIdx.x), int(threadIdx.x));
      __trap();
    }
  }
#else
  while (!ready()) {
  }
#endif
}

}  // namespace dsv4::sm90
