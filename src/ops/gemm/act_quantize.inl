// Run-time NVFP4 quantiser of activation rows: used by every vector instruction set, in 256-bit operations (a small share of
// the work). Included inside the unnamed namespace of an instruction set's file.

inline __m256 abs_ps(__m256 v) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }

inline float max_lane(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Doubled e2m1 of eight values; thresholds and ties of codec/e2m1.h, NaN -> +12.
inline __m256i encode_doubled(__m256 v) {
  const __m256 a = abs_ps(v);
  const auto above = [&](float threshold, int step) {  // a > threshold, or NaN
    return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(a, _mm256_set1_ps(threshold), _CMP_NLE_UQ)),
                            _mm256_set1_epi32(step));
  };
  const auto from = [&](float threshold, int step) {  // a >= threshold, or NaN
    return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(a, _mm256_set1_ps(threshold), _CMP_NLT_UQ)),
                            _mm256_set1_epi32(step));
  };
  __m256i magnitude = _mm256_add_epi32(above(0.25f, 1), from(0.75f, 1));
  magnitude = _mm256_add_epi32(magnitude, _mm256_add_epi32(above(1.25f, 1), from(1.75f, 1)));
  magnitude = _mm256_add_epi32(magnitude, _mm256_add_epi32(above(2.5f, 2), from(3.5f, 2)));
  magnitude = _mm256_add_epi32(magnitude, above(5.0f, 4));
  const __m256 ordered = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
  const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(_mm256_and_ps(v, ordered)), 31);
  return _mm256_sub_epi32(_mm256_xor_si256(magnitude, sign), sign);
}

inline int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}

// One row under the run-time rule of codec/nvfp4.h: sink(group, a, b, sf) for each group of 16 columns, a and b the doubled
// codes of its halves; groups past cols (to whole records of 64) are zeros. max(a, amax) keeps amax when a is NaN.
template <class Sink>
inline GlobalScale quantize_act_groups(const float* x, int64_t cols, const Sink& sink) {
  __m256 amax8 = _mm256_setzero_ps();
  for (int64_t k = 0; k < cols; k += 8) amax8 = _mm256_max_ps(abs_ps(_mm256_loadu_ps(x + k)), amax8);
  const GlobalScale global = nvfp4_global_scale(max_lane(amax8));
  const float rcp6 = nvfp4_rcp6(global);
  const int64_t num_groups = panel_padded_cols(cols) / 16;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (g * 16 >= cols) {
      sink(g, _mm256_setzero_si256(), _mm256_setzero_si256(), 0.0f);
      continue;
    }
    const __m256 a = _mm256_loadu_ps(x + g * 16);
    const __m256 b = _mm256_loadu_ps(x + g * 16 + 8);
    const float amax = max_lane(_mm256_max_ps(abs_ps(b), _mm256_max_ps(abs_ps(a), _mm256_setzero_ps())));
    const uint8_t sf = nvfp4_runtime_sf(amax, rcp6);
    const __m256 multiplier = _mm256_set1_ps(nvfp4_runtime_multiplier(sf, global));
    sink(g, encode_doubled(_mm256_mul_ps(a, multiplier)), encode_doubled(_mm256_mul_ps(b, multiplier)),
         decode_ue4m3(sf));
  }
  return global;
}
