// Stores of neighbouring lanes, arranged so that every instruction fills whole 32-byte sectors.
#pragma once

#include "gpu/ptx/copy.cuh"

namespace dsv4 {

// Each lane owns two 16-byte pieces, at y[piece] and y[piece + 1]; the odd lane's first piece lies kStride pieces after the even
// lane's. The pair swaps one piece, so that one instruction writes both pieces of the even lane and one both of the odd lane.
// Storing them as they are held fills half a sector at a time and runs at half the speed (docs/kernels/quantize.md).
// Every lane of the warp must come here; valid: this lane owns something.
template <int kStride>
__device__ __forceinline__ void store_pieces(void* y, int64_t piece, bool valid, uint4 low, uint4 high) {
  const bool odd = threadIdx.x % 2;
  const uint4 sent = odd ? low : high;
  const uint4 received = {__shfl_xor_sync(0xffffffffu, sent.x, 1), __shfl_xor_sync(0xffffffffu, sent.y, 1),
                          __shfl_xor_sync(0xffffffffu, sent.z, 1), __shfl_xor_sync(0xffffffffu, sent.w, 1)};
  const bool partner_valid = __shfl_xor_sync(0xffffffffu, valid, 1);
  uint4* evens = static_cast<uint4*>(y) + piece + (odd ? 1 - kStride : 0);
  if (odd ? partner_valid : valid) ptx::store_stream_16(evens, odd ? received : low);
  if (odd ? valid : partner_valid) ptx::store_stream_16(evens + kStride, odd ? high : received);
}

}  // namespace dsv4
