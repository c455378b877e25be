// Peak arithmetic with AVX2 + FMA.
#include <immintrin.h>
#include <time.h>

namespace dsv4::bench {
double peak_f32_avx2();
double peak_int8_avx2();

namespace {
#include "bench/peak.inl"
}

double peak_f32_avx2() {
  __m256 chains[12];
  for (__m256& c : chains) c = _mm256_set1_ps(0.5f);
  const __m256 factor = _mm256_set1_ps(0.999f), addend = _mm256_set1_ps(0.001f);
  return measure_peak(chains, 16.0, [&](__m256 c) { return _mm256_fmadd_ps(c, factor, addend); });
}

// The AVX2 stand-in for a 4-way int8 dot product.
double peak_int8_avx2() {
  __m256i chains[12];
  for (__m256i& c : chains) c = _mm256_set1_epi32(1);
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
  const __m256i ones = _mm256_set1_epi16(1);
  return measure_peak(chains, 64.0, [&](__m256i c) {
    asm volatile("" : "+x"(a));
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
  });
}

}  // namespace dsv4::bench
