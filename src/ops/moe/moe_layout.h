// The kernel form of NVFP4 expert weights on Hopper: which code and scale bit lies where. Shared by packer, kernels, tests.
//
// A matrix [rows, cols] is cut into strips of 64 rows, a strip into blocks of 64 columns. One block, 2048 bytes of codes and 256
// of scales, is the A operand of four k16 matrix instructions (m64k16 wgmma, or m16k16 mma.sync per warp) in exactly the order in
// which the 128 threads of a warpgroup want it:
//
//   thread (warp w, g = lane / 4, t = lane % 4): 16 bytes of codes at 16 * thread, 2 bytes of scales at 4 * thread
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
//
// Where blocks lie follows from the two halves of the L2 (gpu/l2_sides.h): memory changes sides every 4 KiB, and every task should
// read one side only. Four strips, a group, times four blocks are a slab, 9 chunks of 4 KiB: chunk 2 r + h has the codes of strip r,
// blocks 2 h and 2 h + 1; chunk 8 the scales, [h][strip][thread][block of the two][2]: one 4-byte load for two blocks. Of every 16 strips the first 8 belong to side 0, the
// others to side 1; the slabs of groups g and g + 2 share nine pairs of chunks, each taking from every pair the chunk at home on its side. A
// word per pair of slabs says which that is: bit i, the side of the first chunk of pair i. Without words (all 0) everything works, near
// or far as it comes. Matrices are stored as if their rows were a multiple of 1024 and their columns of 256; padding columns are zeros.
#pragma once

#include <cstdint>

#include "codec/host_device.h"

namespace dsv4 {

constexpr int kMoeBlockCols = 64;
constexpr int kMoeBlockCodeBytes = 2048;
constexpr int kMoeBlockScaleBytes = 256;
constexpr int kMoeBlockBytes = kMoeBlockCodeBytes + kMoeBlockScaleBytes;
constexpr float kMoeAlphaScale = 256.0f;  // 2^8, see above

DSV4_HD constexpr int64_t moe_fc1_strips(int64_t inter) { return inter / 32; }  // 32 gate and 32 up rows a strip
DSV4_HD constexpr int64_t moe_fc2_strips(int64_t hidden) { return hidden / 64; }

// ---- places ----

constexpr int64_t kMoeChunkBytes = 4096, kMoeChunkPairBytes = 2 * kMoeChunkBytes;
constexpr int kMoeGroupStrips = 4, kMoeSlabBlocks = 4;
constexpr int kMoeScaleChunk = 8;  // of a slab; chunks 0..7 hold codes
constexpr int64_t kMoeSlabPairBytes = 9 * kMoeChunkPairBytes;
constexpr int kMoePairScaleBytes = 2 * kMoeBlockScaleBytes;                   // of two blocks
constexpr int kMoeHalfSlabScaleBytes = kMoeGroupStrips * kMoePairScaleBytes;  // of those of four strips

DSV4_HD constexpr int moe_groups(int64_t strips) { return static_cast<int>((strips + 3) / 4); }
DSV4_HD constexpr int moe_slab_cols(int64_t cols) { return static_cast<int>((cols + 255) / 256); }
DSV4_HD constexpr int moe_group_side(int group) { return group >> 1 & 1; }
// Groups of a side, and the i-th of them.
DSV4_HD constexpr int moe_groups_of_side(int groups, int side) {
  const int rest = (groups & 3) - 2 * side;
  return (groups >> 2) * 2 + (rest < 0 ? 0 : rest > 2 ? 2 : rest);
}
DSV4_HD constexpr int moe_group_of_side(int side, int i) { return (i >> 1) * 4 + side * 2 + (i & 1); }

// Pairs of slabs, and words, of a matrix of an expert; the pair of a group's first slab, whose others follow.
DSV4_HD constexpr int64_t moe_slab_pairs(int64_t strips, int64_t cols) {
  return (strips + 15) / 16 * 2 * moe_slab_cols(cols);
}
DSV4_HD constexpr int64_t moe_first_slab_pair(int group, int slab_cols) {
  return static_cast<int64_t>((group >> 2) * 2 + (group & 1)) * slab_cols;
}
// What a group's word must be combined with: bit i of the result moves chunk i of its slab from the first to the second place of the pair.
DSV4_HD constexpr uint32_t moe_chunk_bits(uint32_t word, int group) {
  return moe_group_side(group) ? word ^ 0x1ff : word;
}

// Bytes from the pair's begin to codes and scales of a block.
struct MoeBlockPlace {
  int64_t codes, scales;
};
DSV4_HD constexpr MoeBlockPlace moe_block_place(int strip, int block, uint32_t chunk_bits) {
  const int r = strip % kMoeGroupStrips, half = block % kMoeSlabBlocks / 2, chunk = 2 * r + half;
  return {chunk * kMoeChunkPairBytes + (chunk_bits >> chunk & 1) * kMoeChunkBytes + block % 2 * kMoeBlockCodeBytes,
          kMoeScaleChunk * kMoeChunkPairBytes + (chunk_bits >> kMoeScaleChunk & 1) * kMoeChunkBytes +
              half * kMoeHalfSlabScaleBytes + r * kMoePairScaleBytes + block % 2 * 2};
}

DSV4_HD constexpr int64_t moe_fc1_slab_pairs(int64_t hidden, int64_t inter) {
  return moe_slab_pairs(moe_fc1_strips(inter), hidden);
}
DSV4_HD constexpr int64_t moe_fc2_slab_pairs(int64_t hidden, int64_t inter) {
  return moe_slab_pairs(moe_fc2_strips(hidden), inter);
}
DSV4_HD constexpr int64_t moe_fc1_bytes(int64_t hidden, int64_t inter) {
  return moe_fc1_slab_pairs(hidden, inter) * kMoeSlabPairBytes;
}
DSV4_HD constexpr int64_t moe_fc2_bytes(int64_t hidden, int64_t inter) {
  return moe_fc2_slab_pairs(hidden, inter) * kMoeSlabPairBytes;
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
