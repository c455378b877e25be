// Expert weights from the checkpoint's linear layout to kernel form (moe_layout.h), on the GPU, once at load.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codec/nvfp4.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4::sm90 {

// One NVFP4 matrix as checkpoints hold it, in device memory.
struct MoeLinearMatrix {
  const uint8_t* codes;  // [rows, cols / 2] e2m1x2
  const uint8_t* sf;     // [rows, cols / 16] ue4m3
  GlobalScale global;    // w1 and w3 may differ
};
struct MoeLinearExpert {
  MoeLinearMatrix w1, w3;  // [inter, hidden]
  MoeLinearMatrix w2;      // [hidden, inter]
};

// Where weights should lie: fills words [bytes / kMoeSlabPairBytes] (device memory) for fc1 or fc2 of all experts, before anything is packed
// into them. Synchronises the stream; 17 ms for a layer of Flash. Zeros where sms are not known.
void find_moe_sides(const gpu::SmSides& sms, uint8_t* matrices, int64_t bytes, uint16_t* words, cudaStream_t stream);

// Fills expert `index` of fc1 [num_experts, moe_fc1_bytes], fc2 [num_experts, moe_fc2_bytes] and alpha [num_experts, 3].
void pack_moe_expert(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, uint8_t* fc1,
                     uint8_t* fc2, float* alpha, const MoeSides& sides, cudaStream_t stream);

// Decodes expert `index` back with the kernels' own decoder and compares every weight, e2m1 * sf as BF16, and the three
// globals with the linear form. Adds the number of differences to *mismatches (device memory).
void verify_moe_expert(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, const uint8_t* fc1,
                       const uint8_t* fc2, const float* alpha, const MoeSides& sides, unsigned long long* mismatches,
                       cudaStream_t stream);

}  // namespace dsv4::sm90
