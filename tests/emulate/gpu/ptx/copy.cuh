// Stands in for src/gpu/ptx/copy.cuh: copies happen at once.
#pragma once

#include "gpu/ptx/sync.cuh"

namespace dsv4::ptx {

inline void async_copy_16(void* smem, const void* global) { std::memcpy(smem, global, 16); }
inline void async_copy_commit() {}
template <int kPending>
void async_copy_wait() {}
inline void store_stream_16(void* pointer, uint4 v) { std::memcpy(pointer, &v, 16); }

}  // namespace dsv4::ptx
