// Panel kernels for AVX-512 with VNNI: binary32 products (exact and a16), int8 quad products (a4).
//
// Not here: vdpbf16ps. On the machine measured (Emerald Rapids) it runs at half the rate of binary32 FMA, so an a16 GEMM on
// it lost to the one that is also exact (docs/kernels/cpu.md).
#include <immintrin.h>

#include "codec/nvfp4.h"
#include "ops/gemm/panel.h"
#include "ops/moe/swiglu.h"

namespace dsv4 {
namespace {

// ---- dense formats: lanes = k ----

using Acc = __m512;
constexpr int kTileTokens = 6;  // 4 x 6 accumulators, 6 x, 1 weight: 31 registers

inline Acc acc_zero() { return _mm512_setzero_ps(); }
inline Acc acc_scaled_add(Acc part, float scale, Acc total) {
  return _mm512_fmadd_ps(part, _mm512_set1_ps(scale), total);
}
inline __m128 fold_to_four(Acc v) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
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
  static constexpr int kStep = 16;
  static constexpr int kActBytes = 4;
  static constexpr float kDecodeFactor = 1.0f;
  using W = __m512;
  using X = __m512;
  static X load_x(const std::byte* x) { return _mm512_loadu_ps(x); }
  static Acc mul_add(Acc acc, W w, X x) { return _mm512_fmadd_ps(w, x, acc); }
};

struct F32Weight : F32Act {
  static constexpr int kWeightBytes = 4;
  static constexpr bool kBlockScaled = false;
  static W load_w(const std::byte* w) { return _mm512_loadu_ps(w); }
};

struct Bf16Weight : F32Act {
  static constexpr int kWeightBytes = 2;
  static constexpr bool kBlockScaled = false;
  static W load_w(const std::byte* w) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};

// e4m3 -> fp16 with the exponent 8 too small (bias 7 against 15), subnormals included: c << 7 with the sign moved up.
struct Fp8Weight : F32Act {
  static constexpr int kWeightBytes = 1;
  static constexpr bool kBlockScaled = true;
  static constexpr float kDecodeFactor = 256.0f;
  static W load_w(const std::byte* w) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    const __m256i shifted = _mm256_slli_epi16(wide, 7);  // the sign stands in bits 15 and 14
    return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
  }
};

#include "ops/gemm/dense_tile.inl"

// ---- NVFP4: lanes = output rows ----

// Sixteen scale factors times 2^-8: ue4m3 << 7 is the fp16 of the same exponent field.
inline __m512 load_sf(const std::byte* sf) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(sf)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 7));
}

inline __m512i load_codes(const std::byte* p) { return _mm512_load_si512(p); }

// How far ahead of the stream, and into which cache: measured on Emerald Rapids, 2 threads (docs/kernels/cpu.md). One or
// two rows of int8 products are bound by memory and want to be far ahead, in L2; slower kernels want L1, nearer.
template <int kRecordsAhead>
inline void prefetch_record(const std::byte* record) {
  for (int line = 0; line < kPanelRecordBytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(record + kRecordsAhead * kPanelRecordBytes + line),
                 kRecordsAhead > 8 ? _MM_HINT_T1 : _MM_HINT_T0);
}

template <int kTokens>
inline void dot_nvfp4_f32(const PanelArgs& args, const std::byte* const* x, float* out) {
  const int64_t num_records = panel_padded_cols(args.w->cols) / kPanelRecordCols;
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f,
                                      -3.0f, -4.0f, -6.0f);
  __m512 sum[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm512_setzero_ps();
  for (int64_t rec = 0; rec < num_records; ++rec) {
    const std::byte* record = args.packed + rec * kPanelRecordBytes;
    prefetch_record<kTokens == 1 ? 8 : 4>(record);
    for (int group = 0; group < 4; ++group) {
      const int64_t x_offset = (rec * 4 + group) * 16;
      __m512 part[kTokens];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) part[t] = _mm512_setzero_ps();
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        const __m512i codes = load_codes(record + (group * 2 + block) * 64);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          // The shift leaves nibble j in the low bits; the look-up ignores what stands above them.
          const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table);
#pragma GCC unroll 16
          for (int t = 0; t < kTokens; ++t) {
            const float value = reinterpret_cast<const float*>(x[t])[x_offset + block * 8 + j];
            part[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(value), part[t]);
          }
        }
      }
      const __m512 sf = load_sf(record + 512 + group * 16);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sum[t] = _mm512_fmadd_ps(part[t], sf, sum[t]);
    }
  }
  const __m512 factor = _mm512_set1_ps(args.w->global.value * 256.0f);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(out + t * kPanelRows, _mm512_mul_ps(sum[t], factor));
}

// Doubled e2m1 value + 12: unsigned, as vpdpbusd wants its first operand.
alignas(16) constexpr uint8_t kE2m1Offset12[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <int kTokens>
inline void dot_nvfp4_a4(const PanelArgs& args, const std::byte* const* x, float* out) {
  const int64_t padded = panel_padded_cols(args.w->cols);
  const int64_t num_records = padded / kPanelRecordCols;
  const int64_t corrections_at = padded, sf_at = padded + padded / 16 * 4;
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1Offset12)));
  __m512 sum[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm512_setzero_ps();
  for (int64_t rec = 0; rec < num_records; ++rec) {
    const std::byte* record = args.packed + rec * kPanelRecordBytes;
    prefetch_record<kTokens <= 2 ? 16 : 4>(record);
    for (int group = 0; group < 4; ++group) {
      const int64_t g = rec * 4 + group;
      __m512i w[4];
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        const __m512i codes = load_codes(record + (group * 2 + block) * 64);
        w[block * 2] = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
        w[block * 2 + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
      }
      const __m512 sf = load_sf(record + 512 + group * 16);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const int32_t* codes = reinterpret_cast<const int32_t*>(x[t]) + g * 4;
        __m512i dot = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x[t] + corrections_at)[g]);
        dot = _mm512_dpbusd_epi32(dot, w[0], _mm512_set1_epi32(codes[0]));
        dot = _mm512_dpbusd_epi32(dot, w[1], _mm512_set1_epi32(codes[1]));
        dot = _mm512_dpbusd_epi32(dot, w[2], _mm512_set1_epi32(codes[2]));
        dot = _mm512_dpbusd_epi32(dot, w[3], _mm512_set1_epi32(codes[3]));
        const __m512 sfx = _mm512_set1_ps(reinterpret_cast<const float*>(x[t] + sf_at)[g]);
        // dot * scale is exact, so the fused form rounds exactly where the contract does.
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(sf, sfx), sum[t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    const float alpha = nvfp4_act_row(x[t], padded).global * args.w->global.value * 0.25f;
    _mm512_storeu_ps(out + t * kPanelRows, _mm512_mul_ps(sum[t], _mm512_set1_ps(alpha)));
  }
}

void dot_nvfp4(const PanelArgs& args) {
  int64_t t = 0;
  const auto run = [&](auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    const std::byte* const* x = args.x + t;
    float* out = args.out + t * kPanelRows;
    if (args.form == ActForm::kNvfp4)
      dot_nvfp4_a4<kTokens>(args, x, out);
    else
      dot_nvfp4_f32<kTokens>(args, x, out);
    t += kTokens;
  };
  while (args.num_x - t >= 8) run(IntConstant<8>{});
  if (args.num_x - t >= 4) run(IntConstant<4>{});
  if (args.num_x - t >= 2) run(IntConstant<2>{});
  if (args.num_x - t >= 1) run(IntConstant<1>{});
}

// ---- activation rows ----

#include "ops/gemm/act_rows.inl"

void prepare_padded(const float* x, int64_t cols, std::byte* out) {
  const int64_t padded = panel_padded_cols(cols);
  __builtin_memcpy(out, x, static_cast<size_t>(cols) * 4);
  __builtin_memset(out + cols * 4, 0, static_cast<size_t>(padded - cols) * 4);
}

ActForm form(WeightFormat format, const ActHint& hint) {
  if (format != WeightFormat::kNvfp4) return ActForm::kF32;
  return hint.a4 ? ActForm::kNvfp4 : ActForm::kF32Padded;
}

void prepare(ActForm form, const float* x, int64_t cols, std::byte* row, int64_t) {
  if (form == ActForm::kNvfp4)
    quantize_act_row(x, cols, row);
  else
    prepare_padded(x, cols, row);
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
      return dot_nvfp4(args);
  }
}

void enter(ActForm, const std::byte* const*, int64_t, int64_t) {}
void leave(ActForm) {}

void dot_pair(const PanelArgs& a, const PanelArgs& b) {
  dot(a);
  dot(b);
}

}  // namespace

const PanelKernels& panel_kernels_avx512() {
  static constexpr PanelKernels kernels{form, prepare, enter, leave, dot, dot_pair, swiglu_row, round_row, add_row};
  return kernels;
}

}  // namespace dsv4
