// Kernels of foundation_test.cpp: what the wrappers of gpu/ptx and gpu/launch.h do, seen from the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4::test {

constexpr int kBoxRows = 64, kBoxCols = 64, kBoxBytes = kBoxRows * kBoxCols * 2;

// Loads the box of `from` at (row, col) and stores it at the same place of `to`; raw[kBoxBytes]: the box as it lay in shared memory.
void copy_box(const CUtensorMap& from, const CUtensorMap& to, int col, int row, uint8_t* raw, cudaStream_t stream);
// A cluster of two: each CTA loads half of the box's rows into both; raw[2][kBoxBytes].
void multicast_box(const CUtensorMap& half_box, uint8_t* raw, cudaStream_t stream);
// bytes through shared memory by bulk copies, at most 64 KiB.
void bulk_round_trip(const uint8_t* from, uint8_t* to, int bytes, cudaStream_t stream);
// ++values[0..count) by that many CTAs; dependent: PDL.
void add_one(int32_t* values, int count, int ctas, bool dependent, cudaStream_t stream);
// Asks for more threads than a block may have, and lets check_launch say so for "add_one [3 x 4]".
void launch_too_many_threads(cudaStream_t stream);

}  // namespace dsv4::test
