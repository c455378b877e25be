// Row-wise activation steps of the AVX2 and AVX-512 panel kernels: NVFP4 rows, SwiGLU, rounding, adding.
// Included inside the unnamed namespace of an instruction set's file; 256-bit in both (these rows are a small share).

#include "ops/gemm/act_quantize.inl"

// A row as panel.h lays out kNvfp4.
void quantize_act_row(const float* x, int64_t cols, std::byte* row) {
  const int64_t padded = panel_padded_cols(cols);
  int32_t* codes = reinterpret_cast<int32_t*>(row);
  int32_t* corrections = reinterpret_cast<int32_t*>(row + padded);
  float* sf256 = reinterpret_cast<float*>(corrections + padded / 16);
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const GlobalScale global = quantize_act_groups(x, cols, [&](int64_t g, __m256i qa, __m256i qb, float sf) {
    corrections[g] = -12 * sum_lanes(_mm256_add_epi32(qa, qb));
    sf256[g] = sf * 256.0f;
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(qa, qb), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + g * 4), _mm_shuffle_epi8(bytes, order));
  });
  sf256[padded / 16] = global.value;
}

// bf16 rounding of eight values, ties to even, NaN kept; the value stays in binary32.
inline __m256 round_bf16_ps(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i rounded =
      _mm256_and_si256(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), upper);
  const __m256i nan = _mm256_and_si256(_mm256_or_si256(u, _mm256_set1_epi32(0x00400000)), upper);
  const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), is_nan);
}

// swiglu.h, operation by operation. min(limit, g) and max(-limit, u) keep a NaN in the second operand.
inline __m256 swiglu_ps(__m256 g, __m256 u, __m256 rho, __m256 limit) {
  namespace c = swiglu_constants;
  const __m256 one = _mm256_set1_ps(1.0f);
  g = _mm256_max_ps(_mm256_set1_ps(-c::kMaxGate), _mm256_min_ps(limit, g));
  u = _mm256_max_ps(_mm256_xor_ps(limit, _mm256_set1_ps(-0.0f)), _mm256_min_ps(limit, u));
  const __m256 x = _mm256_min_ps(_mm256_set1_ps(c::kMaxGate), g);
  const __m256 magic = _mm256_set1_ps(c::kRoundMagic);
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(-c::kLog2e), magic);
  const __m256 n = _mm256_sub_ps(shifted, magic);
  const __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(c::kLn2), x);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(c::kC6), r, _mm256_set1_ps(c::kC5));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c::kC4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c::kC3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c::kC2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(-1.0f));
  p = _mm256_fmadd_ps(p, r, one);
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  const __m256 silu = _mm256_mul_ps(g, _mm256_div_ps(one, _mm256_fmadd_ps(p, power, one)));
  return _mm256_mul_ps(rho, _mm256_mul_ps(silu, u));
}

// count is a multiple of 8: rows come in panels of 16.
void swiglu_row(const float* gate, const float* up, float rho, float limit, bool round_inputs, bool round_output,
                int64_t count, float* h) {
  for (int64_t i = 0; i < count; i += 8) {
    __m256 g = _mm256_loadu_ps(gate + i);
    __m256 u = _mm256_loadu_ps(up + i);
    if (round_inputs) g = round_bf16_ps(g), u = round_bf16_ps(u);
    const __m256 v = swiglu_ps(g, u, _mm256_set1_ps(rho), _mm256_set1_ps(limit));
    _mm256_storeu_ps(h + i, round_output ? round_bf16_ps(v) : v);
  }
}

void round_row(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(x + i, round_bf16_ps(_mm256_loadu_ps(x + i)));
}

void add_row(const float* x, bool round_x, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), round_x ? round_bf16_ps(v) : v));
  }
}
