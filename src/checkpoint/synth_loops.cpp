// Generator and encoder loops; GCC and clang make a version per instruction set and choose when the program is loaded.
#include "checkpoint/synth_loops.h"

#include "codec/bf16.h"

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DSV4_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define DSV4_CLONES  // sanitizers are not set up yet when the choice is made
#endif

namespace dsv4 {
namespace {

// Of a finite value: encode_bf16 without its NaN branch.
inline uint32_t rounded_bits(float x) {
  const uint32_t u = detail::float_bits(x);
  return (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
}

// Sum of four 16-bit uniforms less its mean: near enough to a normal, and exact.
inline int32_t centred_sum(uint64_t bits) {
  return static_cast<int32_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48)) - 131070;
}
inline float normal(int32_t sum) { return static_cast<float>(sum) * (1.0f / 37837.0f); }  // 65536 / sqrt(3)

}  // namespace

DSV4_CLONES void synth_normals(uint64_t key, uint64_t first, int64_t count, float mean, float deviation, bool round, float* out) {
  const uint64_t start = key + first * kSynthGolden;
  if (round) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = detail::bits_float(
          rounded_bits(mean + deviation * normal(centred_sum(synth_mix(start + static_cast<uint64_t>(i) * kSynthGolden)))));
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = mean + deviation * normal(centred_sum(synth_mix(start + static_cast<uint64_t>(i) * kSynthGolden)));
  }
}

DSV4_CLONES float synth_normals_amax(uint64_t key, uint64_t first, int64_t count, float deviation, bool round) {
  const uint64_t start = key + first * kSynthGolden;
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t sum = centred_sum(synth_mix(start + static_cast<uint64_t>(i) * kSynthGolden));
    const int32_t magnitude = sum < 0 ? -sum : sum;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float amax = deviation * normal(largest);
  return round ? detail::bits_float(rounded_bits(amax)) : amax;
}

DSV4_CLONES void synth_nvfp4_row(const float* x, int64_t cols, GlobalScale global, uint8_t* codes, uint8_t* sf) {
  for (int64_t g = 0; g < cols / kNvfp4GroupSize; ++g) {
    const float* w = x + g * kNvfp4GroupSize;
    int32_t amax = 0;
    for (int i = 0; i < kNvfp4GroupSize; ++i) {
      const int32_t magnitude = static_cast<int32_t>(detail::float_bits(w[i]) & 0x7fffffffu);
      amax = magnitude > amax ? magnitude : amax;
    }
    sf[g] = nvfp4_weight_sf(detail::bits_float(static_cast<uint32_t>(amax)), global);
    const float divisor = decode_ue4m3(sf[g]) * global.value;
    // encode_nvfp4_weight_element; zero (of either sign) gets code 0.
    uint32_t code[kNvfp4GroupSize];
    for (int i = 0; i < kNvfp4GroupSize; ++i) {
      const uint32_t bits = detail::float_bits(w[i] / divisor);
      const float a = detail::bits_float(bits & 0x7fffffffu);
      const uint32_t magnitude = static_cast<uint32_t>(a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
      const uint32_t sign = w[i] < 0.0f ? 8u : 0u;
      code[i] = magnitude | sign;
    }
    for (int j = 0; j < kNvfp4GroupSize / 2; ++j) codes[g * (kNvfp4GroupSize / 2) + j] = static_cast<uint8_t>(code[2 * j] | code[2 * j + 1] << 4);
  }
}

DSV4_CLONES void synth_encode_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(rounded_bits(x[i]) >> 16);
}

}  // namespace dsv4
