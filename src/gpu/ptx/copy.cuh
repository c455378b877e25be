// The copy engine (bulk and tensor copies) and cp.async: one wrapper per instruction (PTX ISA 9.7.9.25, 9.7.9.27).
//
// coordinates are elements, innermost first. Completion: loads on an mbarrier (bytes), stores by bulk groups.
#pragma once

#include <cuda.h>  // CUtensorMap

#include <cstdint>

#include "gpu/ptx/sync.cuh"

namespace dsv4::ptx {

// L2 eviction priorities as createpolicy would make them.
enum class L2Hint : uint64_t {
  kEvictFirst = 0x12F0000000000000ull,
};

// ---- plain bulk copies: bytes a multiple of 16, both addresses 16-byte aligned ----

__device__ __forceinline__ void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(smem)),
               "l"(global), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}
__device__ __forceinline__ void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* barrier,
                                          L2Hint hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(smem_address(smem)),
      "l"(global), "r"(bytes), "r"(smem_address(barrier)), "l"(static_cast<uint64_t>(hint))
      : "memory");
}
// To every CTA whose bit is set in cta_mask, same shared offset and barrier offset in each.
__device__ __forceinline__ void bulk_load_multicast(void* smem, const void* global, uint32_t bytes, uint64_t* barrier,
                                                    uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(smem_address(smem)),
      "l"(global), "r"(bytes), "r"(smem_address(barrier)), "h"(cta_mask)
      : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, const void* smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(smem_address(smem)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_prefetch_l2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor copies ----

__device__ __forceinline__ void tma_load_2d(void* smem, const CUtensorMap* map, int32_t c0, int32_t c1,
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          smem_address(smem)),
      "l"(map), "r"(c0), "r"(c1), "r"(smem_address(barrier))
      : "memory");
}
// To every CTA whose bit is set in cta_mask, same shared offset and barrier offset in each.
__device__ __forceinline__ void tma_load_2d_multicast(void* smem, const CUtensorMap* map, int32_t c0, int32_t c1,
                                                      uint64_t* barrier, uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(smem_address(smem)),
      "l"(map), "r"(c0), "r"(c1), "r"(smem_address(barrier)), "h"(cta_mask)
      : "memory");
}
__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map, const void* smem, int32_t c0, int32_t c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(c0),
               "r"(c1), "r"(smem_address(smem))
               : "memory");
}

// ---- cp.async: 16 bytes a thread, bypassing L1 ----

__device__ __forceinline__ void async_copy_16(void* smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(smem)), "l"(global) : "memory");
}
__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// ---- 16-byte global accesses that do not linger in L1 ----

__device__ __forceinline__ uint4 load_stream_16(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}
__device__ __forceinline__ void store_stream_16(void* pointer, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 8 bytes to global memory through a pointer of which the compiler does not know that it is one.
__device__ __forceinline__ void store_global_8(void* pointer, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(pointer), "r"(low), "r"(high) : "memory");
}

}  // namespace dsv4::ptx
