// Which half of a two-sided L2 an SM is near to, and at which half a piece of device memory is at home.
//
// The L2 of a data-centre GPU has two halves. An SM reads what is at home in its own half directly, the rest through the link between
// them: on an H200 an atomic takes 300 clocks or 510, and reading 3.6 GB costs 494 mJ if every SM reads near memory only, 554 mJ
// without looking, 759 mJ from the far half only, at less than half the bandwidth (docs/kernels/moe_sm90.md). Homes change every 4 KiB, by
// a parity of physical address bits: of an aligned pair of such chunks each half has one. CUDA does not tell, so this measures.
//
// Only speed depends on the answer. On a GPU with one L2, or shared with other work while this measures, the sides are not known.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "codec/host_device.h"

namespace dsv4::gpu {

constexpr int64_t kL2ChunkBytes = 4096;

// An argument of kernels.
struct SmSides {
  static constexpr int kMaxSms = 256;
  uint32_t bits[kMaxSms / 32] = {};  // bit smid: the SM's side, all 0 where that is not known
  bool known = false;

  DSV4_HD constexpr uint32_t side(uint32_t smid) const {
    return smid < kMaxSms ? bits[smid / 32] >> (smid % 32) & 1u : 0;
  }
};

// Of the current device. Some milliseconds; synchronises the stream.
SmSides find_sm_sides(cudaStream_t stream);

// The side of each of `chunks` chunks from `data` on, which is aligned to one; all 0 where sms are not known. Adds 0 to a word of each chunk
// by atomics: nothing else may use the memory meanwhile. 20 ns a chunk; synchronises the stream.
std::vector<uint8_t> find_chunk_sides(const SmSides& sms, void* data, int64_t chunks, cudaStream_t stream);

}  // namespace dsv4::gpu
