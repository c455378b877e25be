// Peak arithmetic without vector extensions beyond the baseline.
#include <emmintrin.h>
#include <time.h>

#include "bench/bench.h"

namespace dsv4::bench {
namespace {
#include "bench/peak.inl"
}

double peak_f32_sse2() {
  __m128 chains[12];
  for (__m128& c : chains) c = _mm_set1_ps(0.5f);
  const __m128 factor = _mm_set1_ps(0.999f), addend = _mm_set1_ps(0.001f);
  return measure_peak(chains, 8.0, [&](__m128 c) { return _mm_add_ps(_mm_mul_ps(c, factor), addend); });
}

}  // namespace dsv4::bench
