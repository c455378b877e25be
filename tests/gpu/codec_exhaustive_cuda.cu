// One thread encodes eight neighbouring bit patterns.
#include "gpu/launch.h"
#include "ops/quantize/encode_device.cuh"
#include "gpu/codec_exhaustive.h"

namespace dsv4::test {
namespace {

enum class What { kE2m1, kE2m1Codec, kE4m3 };

template <What kWhat>
__global__ void encode_run(uint32_t first, uint8_t* codes) {
  const uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(first + at + i);
  uint2 bytes{};
  if constexpr (kWhat == What::kE4m3) {
    bytes = encode_e4m3x8(x, 1.0f);
  } else {
    uint32_t nibbles = 0;
    if constexpr (kWhat == What::kE2m1) {
      bool has_nan;
      const float amax = amax_of(x, &has_nan);
      nibbles = !has_nan && amax < 7.0f
                    ? encode_small_e2m1x8(x, kSmallE2m1Scale, signs_of_floats(x), signs_of_floats(x + 4))
                    : encode_any_e2m1x8(x, 1.0f);
    } else {
      for (int i = 0; i < 8; ++i) nibbles |= static_cast<uint32_t>(encode_e2m1(x[i])) << (4 * i);
    }
    for (int i = 0; i < 4; ++i) {
      bytes.x |= (nibbles >> (4 * i) & 0xfu) << (8 * i);
      bytes.y |= (nibbles >> (4 * i + 16) & 0xfu) << (8 * i);
    }
  }
  reinterpret_cast<uint2*>(codes)[at / 8] = bytes;
}

template <What kWhat>
void run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream) {
  DSV4_GPU_REQUIRE("encode_run", count % 2048 == 0, "count = %lld", static_cast<long long>(count));
  gpu::launch(encode_run<kWhat>, {.grid = static_cast<uint32_t>(count / 2048), .block = 256, .stream = stream}, first,
              codes);
}

__global__ void reciprocal_run(uint32_t first, uint32_t last, unsigned long long* wrong) {
  unsigned long long count = 0;
  for (uint64_t bits = first + uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; bits <= last;
       bits += uint64_t{gridDim.x} * blockDim.x) {
    const float d = __uint_as_float(static_cast<uint32_t>(bits));
    count += __float_as_uint(rcp_rn_normal(d)) != __float_as_uint(__frcp_rn(d));
  }
  if (count > 0) atomicAdd(wrong, count);
}

}  // namespace

void count_wrong_reciprocals(float first, float last, unsigned long long* wrong, cudaStream_t stream) {
  gpu::launch(reciprocal_run, {.grid = 4096, .block = 256, .stream = stream}, __builtin_bit_cast(uint32_t, first),
              __builtin_bit_cast(uint32_t, last), wrong);
}
void encode_e2m1_run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream) {
  run<What::kE2m1>(first, count, codes, stream);
}
void encode_e2m1_codec_run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream) {
  run<What::kE2m1Codec>(first, count, codes, stream);
}
void encode_e4m3_run(uint32_t first, int64_t count, uint8_t* codes, cudaStream_t stream) {
  run<What::kE4m3>(first, count, codes, stream);
}

}  // namespace dsv4::test
