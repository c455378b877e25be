// Generator and encoder loops; GCC and clang make a version per instruction set and choose when the program is loaded.
#include "checkpoint/synth_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
  return static_cast<int32_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48)) -
         131070;
}
inline float normal(int32_t sum) { return static_cast<float>(sum) * (1.0f / 37837.0f); }  // 65536 / sqrt(3)

}  // namespace

namespace {

inline float value_at(uint64_t counter, float mean, float deviation, bool round) {
  const float value = mean + deviation * normal(centred_sum(synth_mix(counter)));
  return round ? detail::bits_float(rounded_bits(value)) : value;
}

#if defined(__x86_64__)
// By hand: the compiler's version of the 64-bit multiplications and of the sum takes half as long again.
__attribute__((target("avx2"))) inline __m256i multiply64(__m256i x, uint64_t factor) {
  const __m256i c = _mm256_set1_epi64x(static_cast<int64_t>(factor));
  const __m256i swapped = _mm256_set1_epi64x(static_cast<int64_t>(factor >> 32 | factor << 32));
  const __m256i cross = _mm256_mullo_epi32(x, swapped);  // low x high and high x low
  const __m256i upper = _mm256_slli_epi64(_mm256_add_epi32(cross, _mm256_srli_epi64(cross, 32)), 32);
  return _mm256_add_epi64(_mm256_mul_epu32(x, c), upper);
}

__attribute__((target("avx2"))) inline __m256i mix4(__m256i x) {
  x = multiply64(_mm256_xor_si256(x, _mm256_srli_epi64(x, 30)), 0xbf58476d1ce4e5b9ull);
  x = multiply64(_mm256_xor_si256(x, _mm256_srli_epi64(x, 27)), 0x94d049bb133111ebull);
  return _mm256_xor_si256(x, _mm256_srli_epi64(x, 31));
}

// Pairs of sums of u - 32768 over the 16-bit parts u of four numbers.
__attribute__((target("avx2"))) inline __m256i sum_pairs(__m256i bits) {
  return _mm256_madd_epi16(_mm256_xor_si256(bits, _mm256_set1_epi16(INT16_MIN)), _mm256_set1_epi16(1));
}

// As value_at for count elements, a multiple of 8.
__attribute__((target("avx2"))) void normals_avx2(uint64_t start, int64_t count, float mean, float deviation,
                                                  bool round, float* out) {
  const auto golden = [](uint64_t i) { return static_cast<int64_t>(i * kSynthGolden); };
  const __m256i steps = _mm256_setr_epi64x(golden(0), golden(1), golden(2), golden(3)),
                four = _mm256_set1_epi64x(golden(4));
  __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(start)), steps);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i a = sum_pairs(mix4(counter));
    counter = _mm256_add_epi64(counter, four);
    const __m256i b = sum_pairs(mix4(counter));
    counter = _mm256_add_epi64(counter, four);
    const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
    const __m256 centred = _mm256_cvtepi32_ps(_mm256_add_epi32(sums, _mm256_set1_epi32(4 * 32768 - 131070)));
    const __m256 normals = _mm256_mul_ps(centred, _mm256_set1_ps(1.0f / 37837.0f));
    __m256 value = _mm256_add_ps(_mm256_set1_ps(mean), _mm256_mul_ps(_mm256_set1_ps(deviation), normals));
    if (round) {
      const __m256i u = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      value = _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    _mm256_storeu_ps(out + i, value);
  }
}
#endif

}  // namespace

void synth_normals(uint64_t key, uint64_t first, int64_t count, float mean, float deviation, bool round, float* out) {
  const uint64_t start = key + first * kSynthGolden;
  int64_t i = 0;
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) normals_avx2(start, i = count / 8 * 8, mean, deviation, round, out);
#endif
  for (; i < count; ++i) out[i] = value_at(start + static_cast<uint64_t>(i) * kSynthGolden, mean, deviation, round);
}

// Magnitudes are ordered like their bits.
DSV4_CLONES float synth_amax(const float* x, int64_t count) {
  int32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(detail::float_bits(x[i]) & 0x7fffffffu);
    amax = magnitude > amax ? magnitude : amax;
  }
  return detail::bits_float(static_cast<uint32_t>(amax));
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
      const uint32_t magnitude = static_cast<uint32_t>(a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) +
                                 (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
      const uint32_t sign = w[i] < 0.0f ? 8u : 0u;
      code[i] = magnitude | sign;
    }
    for (int j = 0; j < kNvfp4GroupSize / 2; ++j)
      codes[g * (kNvfp4GroupSize / 2) + j] = static_cast<uint8_t>(code[2 * j] | code[2 * j + 1] << 4);
  }
}

DSV4_CLONES void synth_encode_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(rounded_bits(x[i]) >> 16);
}

DSV4_CLONES void synth_decode_bf16(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = detail::bits_float(static_cast<uint32_t>(x[i]) << 16);
}

}  // namespace dsv4
