// Warp-wide matrix products on registers (mma.sync, PTX ISA 9.7.14.5).
#pragma once

#include <cstdint>

namespace dsv4::ptx {

// d += a b, bf16 operands. With row = lane / 4, pair = lane % 4:
//   a[4]    16 x 16: words (row, pair), (row + 8, pair), (row, pair + 4), (row + 8, pair + 4)
//   b0, b1  16 x 8: pairs pair and pair + 4 of column lane / 4
//   d[4]    rows row, row + 8, columns 2 pair, 2 pair + 1
__device__ __forceinline__ void mma_m16n8k16_bf16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Harmless work that depends on value: ptxas moves arithmetic behind a wait that follows unless something volatile needs it.
__device__ __forceinline__ void need_here(uint32_t value) {
  asm volatile("{\n .reg .pred p;\n setp.eq.u32 p, %0, 0;\n @p nanosleep.u32 0;\n}" ::"r"(value));
}

}  // namespace dsv4::ptx
