// Panel kernels for AVX2 + FMA + F16C: binary32 products (there is no bf16 dot product), int8 products for a4.
#include <immintrin.h>

#include "codec/nvfp4.h"
#include "ops/gemm/panel.h"
#include "ops/moe/swiglu.h"

namespace dsv4 {
namespace {

// ---- dense formats: lanes = k ----

using Acc = __m256;
constexpr int kTileTokens = 3;  // 4 x 3 accumulators, 3 x, 1 weight: 16 registers

inline Acc acc_zero() { return _mm256_setzero_ps(); }
inline Acc acc_scaled_add(Acc part, float scale, Acc total) {
  return _mm256_fmadd_ps(part, _mm256_set1_ps(scale), total);
}
inline __m128 fold_to_four(Acc v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
inline float acc_fold(Acc v) {
  const __m128 four = fold_to_four(v);
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Four folds at once, each in the order of acc_fold.
inline __m128 acc_fold4(Acc va, Acc vb, Acc vc, Acc vd) {
  const __m128 a = fold_to_four(va), b = fold_to_four(vb), c = fold_to_four(vc), d = fold_to_four(vd);
  const __m128 ab_low = _mm_unpacklo_ps(a, b), ab_high = _mm_unpackhi_ps(a, b);
  const __m128 cd_low = _mm_unpacklo_ps(c, d), cd_high = _mm_unpackhi_ps(c, d);
  const __m128 lane0 = _mm_movelh_ps(ab_low, cd_low), lane1 = _mm_movehl_ps(cd_low, ab_low);
  const __m128 lane2 = _mm_movelh_ps(ab_high, cd_high), lane3 = _mm_movehl_ps(cd_high, ab_high);
  return _mm_add_ps(_mm_add_ps(lane0, lane2), _mm_add_ps(lane1, lane3));
}

struct F32Act {
  static constexpr int kStep = 8;
  static constexpr int kActBytes = 4;
  static constexpr float kDecodeFactor = 1.0f;
  using W = __m256;
  using X = __m256;
  static X load_x(const std::byte* x) { return _mm256_loadu_ps(reinterpret_cast<const float*>(x)); }
  static Acc mul_add(Acc acc, W w, X x) { return _mm256_fmadd_ps(w, x, acc); }
};

struct F32Weight : F32Act {
  static constexpr int kWeightBytes = 4;
  static constexpr bool kBlockScaled = false;
  static W load_w(const std::byte* w) { return _mm256_loadu_ps(reinterpret_cast<const float*>(w)); }
};

struct Bf16Weight : F32Act {
  static constexpr int kWeightBytes = 2;
  static constexpr bool kBlockScaled = false;
  static W load_w(const std::byte* w) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};

// e4m3 -> fp16 with the exponent 8 too small (bias 7 against 15), subnormals included: c << 7 with the sign moved up.
struct Fp8Weight : F32Act {
  static constexpr int kWeightBytes = 1;
  static constexpr bool kBlockScaled = true;
  static constexpr float kDecodeFactor = 256.0f;
  static W load_w(const std::byte* w) {
    const __m128i c = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
    const __m128i high = _mm_unpacklo_epi8(_mm_setzero_si128(), c);
    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(high, 1), _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
  }
};

#include "ops/gemm/dense_tile.inl"

// ---- NVFP4: lanes = output rows ----

// Eight scale factors times 2^-8: ue4m3 << 7 is the fp16 of the same exponent field.
inline __m256 load_sf(const std::byte* sf) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(sf)));
  return _mm256_cvtph_ps(_mm_slli_epi16(wide, 7));
}

inline __m256i load_codes(const std::byte* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// Distance and cache as in panel_avx512.cpp.
template <int kRecordsAhead>
inline void prefetch_record(const std::byte* record) {
  for (int line = 0; line < kPanelRecordBytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(record + kRecordsAhead * kPanelRecordBytes + line),
                 kRecordsAhead > 8 ? _MM_HINT_T1 : _MM_HINT_T0);
}

// bf16 of the e2m1 values, split in bytes, twice (one copy per 128-bit lane).
alignas(32) constexpr uint8_t kE2m1High[32] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf,
                                               0xbf, 0xc0, 0xc0, 0xc0, 0xc0, 0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40,
                                               0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
alignas(32) constexpr uint8_t kE2m1Low[32] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00, 0x80,
                                              0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40,
                                              0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
// Doubled e2m1 value + 12: unsigned, as maddubs wants its first operand.
alignas(32) constexpr uint8_t kE2m1Offset12[32] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                                   12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Eight rows x eight columns of codes as binary32: low[p] holds rows 0 1 (4 5), high[p] rows 2 3 (6 7), each row as the
// column pair p of (0 4) (2 6) (1 5) (3 7).
struct DecodedF32 {
  __m256 low[4], high[4];
};

inline DecodedF32 decode_f32(__m256i codes) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i table_high = _mm256_load_si256(reinterpret_cast<const __m256i*>(kE2m1High));
  const __m256i table_low = _mm256_load_si256(reinterpret_cast<const __m256i*>(kE2m1Low));
  const __m256i index[2] = {_mm256_and_si256(codes, nibble), _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)};
  DecodedF32 d;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i hi = _mm256_shuffle_epi8(table_high, index[i]);
    const __m256i lo = _mm256_shuffle_epi8(table_low, index[i]);
    const __m256i a = _mm256_unpacklo_epi8(lo, hi);
    const __m256i b = _mm256_unpackhi_epi8(lo, hi);
    d.low[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    d.low[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
    d.high[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    d.high[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
  }
  return d;
}

inline __m256 broadcast_pair(const float* x) {
  return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
}

template <int kTokens>
inline void dot_nvfp4_f32(const PanelArgs& args, const std::byte* const* x, float* out) {
  const int64_t num_records = panel_padded_cols(args.w->cols) / kPanelRecordCols;
  const __m256 factor = _mm256_set1_ps(args.w->global.value * 256.0f);
  for (int half = 0; half < 2; ++half) {
    __m256 sum_low[kTokens], sum_high[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sum_low[t] = sum_high[t] = _mm256_setzero_ps();
    for (int64_t rec = 0; rec < num_records; ++rec) {
      const std::byte* record = args.packed + rec * kPanelRecordBytes;
      if (half == 0) prefetch_record<kTokens == 1 ? 8 : 4>(record);
      for (int group = 0; group < 4; ++group) {
        __m256 low[kTokens], high[kTokens];
#pragma GCC unroll 2
        for (int block = 0; block < 2; ++block) {
          const DecodedF32 d = decode_f32(load_codes(record + (group * 2 + block) * 64 + half * 32));
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
              const float* xt = reinterpret_cast<const float*>(x[t]) + rec * 64 + group * 16 + block * 8 + p * 2;
              const __m256 pair = broadcast_pair(xt);
              low[t] = block + p == 0 ? _mm256_mul_ps(d.low[p], pair) : _mm256_fmadd_ps(d.low[p], pair, low[t]);
              high[t] = block + p == 0 ? _mm256_mul_ps(d.high[p], pair) : _mm256_fmadd_ps(d.high[p], pair, high[t]);
            }
          }
        }
        const __m256 sf = load_sf(record + 512 + group * 16 + half * 8);
        const __m256 sf_low = _mm256_unpacklo_ps(sf, sf);
        const __m256 sf_high = _mm256_unpackhi_ps(sf, sf);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          sum_low[t] = _mm256_fmadd_ps(low[t], sf_low, sum_low[t]);
          sum_high[t] = _mm256_fmadd_ps(high[t], sf_high, sum_high[t]);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      _mm256_storeu_ps(out + t * kPanelRows + half * 8, _mm256_mul_ps(_mm256_hadd_ps(sum_low[t], sum_high[t]), factor));
  }
}

// Many rows of x: two records are decoded into L1, where tiles of four rows of x meet them; the sums of rows are parked in
// scratch. The operations of each sum are those of dot_nvfp4_f32, in the same order.
constexpr int kDecodedGroups = 8;
constexpr int kDecodedChunk = 64;  // rows of x per pass over the panel
constexpr int kMinDecoded = 6;

struct DecodedScratch {
  DecodedF32 weights[2][kDecodedGroups][2];  // [half][group][block]
  __m256 sf[2][kDecodedGroups][2];           // [half][group][low, high]
  __m256 sum[kDecodedChunk][2][2];           // [x row][half][low, high]
};
static_assert(sizeof(DecodedScratch) <= kPanelScratchBytes);

void decode_groups(const std::byte* packed, int64_t first_group, int num_groups, DecodedScratch& s) {
  for (int i = 0; i < num_groups; ++i) {
    const int64_t group = first_group + i;
    const std::byte* record = packed + group / 4 * kPanelRecordBytes;
    for (int half = 0; half < 2; ++half) {
      for (int block = 0; block < 2; ++block)
        s.weights[half][i][block] = decode_f32(load_codes(record + (group % 4 * 2 + block) * 64 + half * 32));
      const __m256 sf = load_sf(record + 512 + group % 4 * 16 + half * 8);
      s.sf[half][i][0] = _mm256_unpacklo_ps(sf, sf);
      s.sf[half][i][1] = _mm256_unpackhi_ps(sf, sf);
    }
  }
}

template <int kTokens>
inline void dot_decoded(DecodedScratch& s, int token, const std::byte* const* x, int64_t first_group, int num_groups) {
  for (int half = 0; half < 2; ++half) {
    for (int group = 0; group < num_groups; ++group) {
      __m256 low[kTokens], high[kTokens];
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        const DecodedF32& d = s.weights[half][group][block];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            const float* xt = reinterpret_cast<const float*>(x[t]) + (first_group + group) * 16 + block * 8 + p * 2;
            const __m256 pair = broadcast_pair(xt);
            low[t] = block + p == 0 ? _mm256_mul_ps(d.low[p], pair) : _mm256_fmadd_ps(d.low[p], pair, low[t]);
            high[t] = block + p == 0 ? _mm256_mul_ps(d.high[p], pair) : _mm256_fmadd_ps(d.high[p], pair, high[t]);
          }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        __m256* sum = s.sum[token + t][half];
        sum[0] = _mm256_fmadd_ps(low[t], s.sf[half][group][0], sum[0]);
        sum[1] = _mm256_fmadd_ps(high[t], s.sf[half][group][1], sum[1]);
      }
    }
  }
}

void dot_nvfp4_f32_many(const PanelArgs& args, const std::byte* const* x, int num_x, float* out) {
  DecodedScratch& s = *reinterpret_cast<DecodedScratch*>(args.scratch);
  const int64_t total_groups = panel_padded_cols(args.w->cols) / 16;
  for (int t = 0; t < num_x; ++t)
    for (int i = 0; i < 4; ++i) s.sum[t][i / 2][i % 2] = _mm256_setzero_ps();
  for (int64_t first = 0; first < total_groups; first += kDecodedGroups) {
    const int num_groups =
        static_cast<int>(total_groups - first < kDecodedGroups ? total_groups - first : kDecodedGroups);
    decode_groups(args.packed, first, num_groups, s);
    int t = 0;
    for (; t + 4 <= num_x; t += 4) dot_decoded<4>(s, t, x + t, first, num_groups);
    if (num_x - t == 3)
      dot_decoded<3>(s, t, x + t, first, num_groups);
    else if (num_x - t == 2)
      dot_decoded<2>(s, t, x + t, first, num_groups);
    else if (num_x - t == 1)
      dot_decoded<1>(s, t, x + t, first, num_groups);
  }
  const __m256 factor = _mm256_set1_ps(args.w->global.value * 256.0f);
  for (int t = 0; t < num_x; ++t)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_ps(out + t * kPanelRows + half * 8,
                       _mm256_mul_ps(_mm256_hadd_ps(s.sum[t][half][0], s.sum[t][half][1]), factor));
}

template <int kTokens>
inline void dot_nvfp4_a4(const PanelArgs& args, const std::byte* const* x, float* out) {
  const int64_t padded = panel_padded_cols(args.w->cols);
  const int64_t num_records = padded / kPanelRecordCols;
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kE2m1Offset12));
  Nvfp4ActRow rows[kTokens];
  for (int t = 0; t < kTokens; ++t) rows[t] = nvfp4_act_row(x[t], padded);

  for (int half = 0; half < 2; ++half) {
    __m256 sum[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sum[t] = _mm256_setzero_ps();
    for (int64_t rec = 0; rec < num_records; ++rec) {
      const std::byte* record = args.packed + rec * kPanelRecordBytes;
      if (half == 0) prefetch_record<kTokens <= 2 ? 16 : 4>(record);
      for (int group = 0; group < 4; ++group) {
        const int64_t g = rec * 4 + group;
        __m256i w[4];
#pragma GCC unroll 2
        for (int block = 0; block < 2; ++block) {
          const __m256i codes = load_codes(record + (group * 2 + block) * 64 + half * 32);
          w[block * 2] = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble));
          w[block * 2 + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
        }
        const __m256 sf = load_sf(record + 512 + group * 16 + half * 8);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const int32_t* codes = reinterpret_cast<const int32_t*>(rows[t].codes) + g * 4;
          const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], _mm256_set1_epi32(codes[0])),
                                             _mm256_maddubs_epi16(w[1], _mm256_set1_epi32(codes[1])));
          const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], _mm256_set1_epi32(codes[2])),
                                             _mm256_maddubs_epi16(w[3], _mm256_set1_epi32(codes[3])));
          const __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(_mm256_add_epi16(a, b), ones),
                                               _mm256_set1_epi32(rows[t].corrections[g]));
          // dot * scale is exact, so the fused form rounds exactly where the contract does.
          sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(sf, _mm256_broadcast_ss(rows[t].sf256 + g)),
                                   sum[t]);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      _mm256_storeu_ps(out + t * kPanelRows + half * 8,
                       _mm256_mul_ps(sum[t], _mm256_set1_ps(rows[t].global * args.w->global.value * 0.25f)));
  }
}

template <bool kA4>
void dot_nvfp4(const PanelArgs& args) {
  int64_t t = 0;
  const auto run = [&](auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    if constexpr (kA4)
      dot_nvfp4_a4<kTokens>(args, args.x + t, args.out + t * kPanelRows);
    else
      dot_nvfp4_f32<kTokens>(args, args.x + t, args.out + t * kPanelRows);
    t += kTokens;
  };
  if constexpr (!kA4) {
    while (args.num_x - t >= kMinDecoded) {
      const int count = static_cast<int>(args.num_x - t < kDecodedChunk ? args.num_x - t : kDecodedChunk);
      dot_nvfp4_f32_many(args, args.x + t, count, args.out + t * kPanelRows);
      t += count;
    }
  }
  while (args.num_x - t >= 4) run(IntConstant<4>{});
  if (args.num_x - t == 3)
    run(IntConstant<3>{});
  else if (args.num_x - t == 2)
    run(IntConstant<2>{});
  else if (args.num_x - t == 1)
    run(IntConstant<1>{});
}

// ---- activation rows ----

void prepare_panel_f32(const float* x, int64_t cols, float* out) {
  const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
  const int64_t padded = panel_padded_cols(cols);
  int64_t k = 0;
  for (; k + 8 <= cols; k += 8) _mm256_storeu_ps(out + k, _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + k), order));
  for (; k < padded; k += 8) _mm256_storeu_ps(out + k, _mm256_setzero_ps());
}

#include "ops/gemm/act_rows.inl"

ActForm form(WeightFormat format, const ActHint& hint) {
  if (format != WeightFormat::kNvfp4) return ActForm::kF32;
  return hint.a4 ? ActForm::kNvfp4 : ActForm::kF32Panel;
}

void prepare(ActForm form, const float* x, int64_t cols, std::byte* row, int64_t) {
  if (form == ActForm::kNvfp4)
    quantize_act_row(x, cols, row);
  else
    prepare_panel_f32(x, cols, reinterpret_cast<float*>(row));
}

void dot(const PanelArgs& args) {
  switch (args.w->format) {
    case WeightFormat::kF32:
      return dot_dense<F32Weight>(args);
    case WeightFormat::kBf16:
      return dot_dense<Bf16Weight>(args);
    case WeightFormat::kFp8Block:
      return dot_dense<Fp8Weight>(args);
    case WeightFormat::kNvfp4:
      return args.form == ActForm::kNvfp4 ? dot_nvfp4<true>(args) : dot_nvfp4<false>(args);
  }
}

void enter(ActForm, const std::byte* const*, int64_t, int64_t) {}
void leave(ActForm) {}

void dot_pair(const PanelArgs& a, const PanelArgs& b) {
  dot(a);
  dot(b);
}

}  // namespace

const PanelKernels& panel_kernels_avx2() {
  static constexpr PanelKernels kernels{form, prepare, enter, leave, dot, dot_pair, swiglu_row, round_row, add_row};
  return kernels;
}

}  // namespace dsv4
