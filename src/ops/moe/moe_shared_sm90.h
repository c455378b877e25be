// The shared expert on Hopper: FP8 weights (e4m3 with power-of-two scales per 128x128), every token, always a16.
//
// Kernel form: as moe_layout.h (same strips, same row and column order, so the same epilogues and token operands), but a block
// of 64x64 is two halves of 2048 bytes of codes and 16 of scales, so that a thread's share of a half is as large as its share of
// an NVFP4 block and the decode tiers load both alike. Half h, thread (warp, lane): 16 bytes at 16 * thread, words 0, 1 row g,
// words 2, 3 row g + 8, of matrix steps s = 2 h, 2 h + 1: columns 16 t + 4 s + {0, 2, 1, 3} from the low byte up, so that a word
// becomes two bf16 pairs by moving bits. A code so moved is e4m3 * 2^-120 (subnormals included); the block's factor, 2^120 times
// its scale over the matrix's largest, makes it exact again (4 significant bits). The factor is 2^(b - 127), byte b at 2048 for
// the low rows (fc1: gate), at 2049 for the high (up), then 14 unused bytes. alpha is the largest scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codec/bf16.h"
#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4::sm90 {

constexpr int kMoeFp8HalfBytes = kMoeBlockCodeBytes + 16;
constexpr int kMoeFp8BlockBytes = 2 * kMoeFp8HalfBytes;
DSV4_HD constexpr int64_t moe_shared_fc1_bytes(int64_t hidden, int64_t inter) {
  return moe_fc1_strips(inter) * (hidden / kMoeBlockCols) * kMoeFp8BlockBytes;
}
DSV4_HD constexpr int64_t moe_shared_fc2_bytes(int64_t hidden, int64_t inter) {
  return moe_fc2_strips(hidden) * (inter / kMoeBlockCols) * kMoeFp8BlockBytes;
}

// One matrix as checkpoints hold it, in device memory.
struct MoeLinearFp8 {
  const uint8_t* codes;       // [rows, cols] e4m3
  const float* block_scales;  // [ceil(rows / 128), ceil(cols / 128)], powers of two
};
struct MoeLinearShared {
  MoeLinearFp8 w1, w3;  // [inter, hidden]
  MoeLinearFp8 w2;      // [hidden, inter]
};

void pack_moe_shared(const MoeLinearShared& expert, int64_t hidden, int64_t inter, uint8_t* fc1, uint8_t* fc2,
                     float* alpha, cudaStream_t stream);
// Decodes with the kernels' own decoder and compares every weight with the linear form; adds the number of differences. A scale
// that is no power of two, or a NaN code, shows here.
void verify_moe_shared(const MoeLinearShared& expert, int64_t hidden, int64_t inter, const uint8_t* fc1,
                       const uint8_t* fc2, const float* alpha, unsigned long long* mismatches, cudaStream_t stream);

struct MoeSharedArgs {
  MoeSharedWeights weights;
  const bf16* x;  // [num_tokens, hidden]
  bf16* h;        // [num_tokens, inter]   scratch
  bf16* y;        // [num_tokens, hidden]
  int64_t num_tokens;
  int hidden;
  float swiglu_limit;
};
// Two launches. Up to kSharedStreamTokens tokens weights are streamed past mma.sync; beyond, tiles of 128 tokens and wgmma.
constexpr int64_t kSharedStreamTokens = 128;
void launch_moe_shared(const MoeSharedArgs& args, cudaStream_t stream);

}  // namespace dsv4::sm90
