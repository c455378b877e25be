// Stands in for src/gpu/ptx/sync.cuh.
#pragma once

#include "emulate.h"

namespace dsv4::ptx {

inline emulate::Cta& cta() { return *emulate::machine.current->cta; }
inline uint32_t smem_offset(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - cta().smem);
}
inline uint8_t* dynamic_smem() { return cta().smem; }

inline void complete_if_due(emulate::MemoryBarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0)
    barrier.parity ^= 1, barrier.pending = barrier.arrivals, emulate::machine.progress = true;
}
inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  cta().memory_barriers[smem_offset(barrier)] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulate::MemoryBarrier& b = cta().memory_barriers.at(smem_offset(barrier));
  if (b.pending == 0) throw std::runtime_error("an arrival at a phase that has all of its arrivals");
  b.bytes += bytes, --b.pending;
  complete_if_due(b);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const emulate::MemoryBarrier& b = cta().memory_barriers.at(smem_offset(barrier));
  emulate::wait_until([&] { return b.parity != parity; });
}
inline void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
inline void fence_mbarrier_init() {}

inline void named_barrier_sync(uint32_t id, uint32_t threads) {
  emulate::sync(cta().named[id], static_cast<int>(threads));
}
inline void named_barrier_arrive(uint32_t id, uint32_t threads) {
  emulate::arrive(cta().named[id], static_cast<int>(threads));
}
inline void cluster_arrive() {
  emulate::Cluster& cluster = *cta().cluster;
  emulate::machine.current->cluster_generation = cluster.barrier.generation;
  emulate::arrive(cluster.barrier, static_cast<int>(cluster.ctas.size() * emulate::machine.block));
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  emulate::wait_until([] { return cta().cluster->barrier.generation != emulate::machine.current->cluster_generation; });
}
inline uint32_t cluster_cta_rank() { return cta().rank; }
inline uint32_t cluster_size() { return static_cast<uint32_t>(cta().cluster->ctas.size()); }
inline uint32_t cluster_id() { return emulate::machine.current->block / cluster_size(); }
inline uint32_t num_clusters() { return emulate::machine.grid / cluster_size(); }

inline uint32_t map_to_cta(const void* pointer, uint32_t rank) { return rank << 20 | smem_offset(pointer); }
template <class T>
void store_async_cluster(uint32_t address, T value, uint32_t barrier) {
  if (address >> 20 != barrier >> 20) throw std::runtime_error("a store and its barrier in different CTAs");
  emulate::Cta& to = *cta().cluster->ctas.at(address >> 20);
  std::memcpy(to.smem + (address & 0xfffff), &value, sizeof value);
  emulate::MemoryBarrier& b = to.memory_barriers.at(barrier & 0xfffff);
  b.bytes -= static_cast<int64_t>(sizeof value);
  complete_if_due(b);
}
inline void store_async_cluster_f32(uint32_t address, float value, uint32_t barrier) {
  store_async_cluster(address, value, barrier);
}
inline void store_async_cluster_f64(uint32_t address, double value, uint32_t barrier) {
  store_async_cluster(address, value, barrier);
}

inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

}  // namespace dsv4::ptx
