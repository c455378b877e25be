// Peak arithmetic with AVX-512: FMA, VNNI, BF16 dot product.
#include <immintrin.h>
#include <time.h>

namespace dsv4::bench {
double peak_f32_avx512();
double peak_int8_avx512();
double peak_bf16_avx512();

namespace {
#include "bench/peak.inl"
}

double peak_f32_avx512() {
  __m512 chains[12];
  for (__m512& c : chains) c = _mm512_set1_ps(0.5f);
  const __m512 factor = _mm512_set1_ps(0.999f), addend = _mm512_set1_ps(0.001f);
  return measure_peak(chains, 32.0, [&](__m512 c) { return _mm512_fmadd_ps(c, factor, addend); });
}

double peak_int8_avx512() {
  __m512i chains[12];
  for (__m512i& c : chains) c = _mm512_set1_epi32(1);
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  return measure_peak(chains, 128.0, [&](__m512i c) { return _mm512_dpbusd_epi32(c, a, b); });
}

double peak_bf16_avx512() {
  __m512 chains[12];
  for (__m512& c : chains) c = _mm512_set1_ps(0.5f);
  const __m512i a = _mm512_set1_epi16(0x3c00), b = _mm512_set1_epi16(0x3c01);
  return measure_peak(chains, 64.0, [&](__m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); });
}

}  // namespace dsv4::bench
