// The kernel form of NVFP4 expert weights on Hopper: which code and scale bit lies where. Shared by packer, kernels, tests.
//
// A matrix [rows, cols] is cut into strips of 64 rows, a strip into blocks of 64 columns; blocks of a strip are contiguous.
// One block, 2304 bytes = 2048 of codes + 256 of scales, is the A operand of four k16 matrix instructions (m64k16 wgmma, or
// m16k16 mma.sync per warp) in exactly the order in which the 128 threads of a warpgroup want it:
//
//   thread (warp w, g = lane / 4, t = lane % 4): 16 bytes of codes at 16 * thread, 2 bytes of scales at 2048 + 2 * thread
//   word 0, 1: row g of the warp's 16, word 2, 3: row g + 8; columns 16 t .. 16 t + 15 of the block: one scale group
//   scale byte 0: row g, byte 1: row g + 8
//
// The contraction axis is permuted so that a thread's 16 columns are one group (one scale decode per 16 weights, not per 4):
// matrix step s (0..3), fragment column c = 2 t + i + 8 j  <->  column 16 t + 4 s + 2 j + i of the block. The token operand
// is stored in the same order (kernel_column).
//
// Scale byte: ue5m3, 2^(E - 21) * (1 + m / 8): ue4m3 with its subnormals normalised, so that bf16(0x7000 | byte << 4) is
// sf * 2^118. A code becomes bf16 e2m1 * 2^-126 (subnormals included) by moving its bits to 15 and 8..6; the bf16 product
// is e2m1 * sf * 2^-8, exact (6 significant bits). alpha carries the 2^8.
#pragma once

#include <cstdint>

#include "codec/host_device.h"

namespace dsv4 {

constexpr int kMoeBlockCols = 64;
constexpr int kMoeBlockCodeBytes = 2048;
constexpr int kMoeBlockBytes = kMoeBlockCodeBytes + 256;
constexpr float kMoeAlphaScale = 256.0f;  // 2^8, see above

DSV4_HD constexpr int64_t moe_fc1_strips(int64_t inter) { return inter / 32; }  // 32 gate and 32 up rows a strip
DSV4_HD constexpr int64_t moe_fc2_strips(int64_t hidden) { return hidden / 64; }
DSV4_HD constexpr int64_t moe_fc1_bytes(int64_t hidden, int64_t inter) {
  return moe_fc1_strips(inter) * (hidden / kMoeBlockCols) * kMoeBlockBytes;
}
DSV4_HD constexpr int64_t moe_fc2_bytes(int64_t hidden, int64_t inter) {
  return moe_fc2_strips(hidden) * (inter / kMoeBlockCols) * kMoeBlockBytes;
}

// ---- rows ----

// fc1: rows 0..7 of a warp are gate rows, 8..15 the up rows of the same h columns, so one thread holds both. A warp's eight h
// columns are one 16-byte chunk of the token operand of fc2.
DSV4_HD constexpr int moe_fc1_row(int strip, int warp, int g) {
  const int chunk = (strip & 1) * 4 + warp;
  return (strip >> 1) * 64 + 16 * (g >> 1) + 4 * (chunk >> 1) + 2 * (chunk & 1) + (g & 1);
}
// fc2: row 0..15 of the warp -> output column. After an 8x8 transpose a thread holds four consecutive columns.
DSV4_HD constexpr int moe_fc2_row(int strip, int warp, int row) {
  return strip * 64 + warp * 16 + 4 * ((row & 7) >> 1) + (row & 1) + (row >= 8 ? 2 : 0);
}

// ---- columns ----

// Position (0..63) in the token operand of column k (0..63) of a block.
DSV4_HD constexpr int moe_kernel_column(int k) {
  const int t = k >> 4, s = (k >> 2) & 3, j = (k >> 1) & 1, i = k & 1;
  return (2 * s + j) * 8 + 2 * t + i;
}
// Inverse: the column at a position.
DSV4_HD constexpr int moe_source_column(int position) {
  const int chunk = position >> 3, t = (position >> 1) & 3, i = position & 1;
  return 16 * t + 2 * chunk + i;
}

// ---- bits ----

// Which bit of a code word becomes bit `out` (15, 8, 7, 6 or + 16) of output pair p: pairs 0, 1 are shifted left by 2 and 6,
// pair 2 is rotated left by 12, pair 3 lies in place but for its mantissa bit, 8 higher.
DSV4_HD constexpr int moe_code_bit(int pair, int out) {
  if (pair == 0) return out - 2;
  if (pair == 1) return out - 6;
  if (pair == 2) return (out + 20) & 31;
  return (out & 15) == 6 ? out + 8 : out;
}
// Eight codes, element 2 p + i of pair p, -> one word.
DSV4_HD constexpr uint32_t moe_pack_codes(const uint8_t* codes) {
  uint32_t word = 0;
  for (int e = 0; e < 8; ++e) {
    const int pair = e >> 1, half = (e & 1) * 16;
    const uint32_t code = codes[e];
    word |= ((code >> 3) & 1u) << moe_code_bit(pair, 15 + half);
    word |= ((code >> 2) & 1u) << moe_code_bit(pair, 8 + half);
    word |= ((code >> 1) & 1u) << moe_code_bit(pair, 7 + half);
    word |= (code & 1u) << moe_code_bit(pair, 6 + half);
  }
  return word;
}

// ue4m3 byte -> ue5m3 byte. 0 has no ue5m3 code: the packer clears the codes instead. 0x7f (NaN) stays NaN after decoding.
DSV4_HD constexpr uint8_t moe_pack_sf(uint8_t ue4m3) {
  const int exponent = ue4m3 >> 3, mantissa = ue4m3 & 7;
  if (ue4m3 == 0x7f) return 0xff;
  if (exponent > 0) return static_cast<uint8_t>(((exponent - 7 + 21) << 3) | mantissa);
  if (mantissa == 0) return 21 << 3;
  const int shift = mantissa >= 4 ? 2 : (mantissa >= 2 ? 1 : 0);  // mantissa = 2^shift * (1 + ...)
  return static_cast<uint8_t>(((shift - 9 + 21) << 3) | ((mantissa << (3 - shift)) & 7));
}

}  // namespace dsv4
