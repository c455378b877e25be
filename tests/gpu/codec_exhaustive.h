// Device encoders applied to a run of binary32 bit patterns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4::test {

// codes[i]: e2m1 nibble of the binary32 with bits first + i, through the device encoders (eight patterns at a time).
void encode_e2m1_run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream);
// The same with the codec function of codec/e2m1.h, run on the device.
void encode_e2m1_codec_run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream);
// e4m3 byte, through encode_e4m3x8 with factor 1.
void encode_e4m3_run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream);

// Adds to *wrong the number of binary32 in [first, last] whose rcp_rn_normal is not the rounded reciprocal.
void count_wrong_reciprocals(float first, float last, unsigned long long* wrong, cudaStream_t stream);

}  // namespace dsv4::test
