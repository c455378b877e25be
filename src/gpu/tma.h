// TMA descriptors (CUtensorMap). The encoder is a driver function, looked up at run time: nothing links libcuda.
//
// Pass the map to the kernel by value as `const __grid_constant__ CUtensorMap`.
#pragma once

#include <cuda.h>  // types only

#include <cstdint>

namespace dsv4::gpu {

enum class TmaType { kU8, kU16, kU32, kBf16, kF16, kF32 };
enum class TmaSwizzle { kNone, k32B, k64B, k128B };
enum class TmaL2Promotion { kNone, k64B, k128B, k256B };

struct TmaShape {
  int rank = 2;                   // 1..5
  uint64_t size[5] = {};          // elements, innermost first
  uint64_t stride_bytes[5] = {};  // of dimensions 1..rank-1 ([0] is unused: the innermost is dense); multiples of 16
  uint32_t box[5] = {};  // elements a copy moves, innermost first; box[0] * element size a multiple of 16, each <= 256
};

// base: global address, 16-byte aligned. Out-of-bounds elements read as zero.
// Throws Error naming the shape when the driver refuses.
CUtensorMap make_tma_map(TmaType type, const void* base, const TmaShape& shape, TmaSwizzle swizzle,
                         TmaL2Promotion promotion = TmaL2Promotion::k128B);

// Row-major matrix [rows, cols], rows stride_bytes apart, copied in boxes of [box_rows, box_cols].
CUtensorMap make_tma_map_2d(TmaType type, const void* base, uint64_t rows, uint64_t cols, uint64_t stride_bytes,
                            uint32_t box_rows, uint32_t box_cols, TmaSwizzle swizzle,
                            TmaL2Promotion promotion = TmaL2Promotion::k128B);

}  // namespace dsv4::gpu
