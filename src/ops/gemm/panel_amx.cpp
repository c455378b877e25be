// Panel kernels for AMX: bf16 tiles for every product whose activations are bf16 values (a16) or NVFP4 (a4). Exact binary32
// activations, binary32 weights and a4 with few rows stay with the AVX-512 kernels.
//
// What makes tiles usable here: e2m1 * sf and e4m3 have at most 6 significant bits, so a decoded weight is exact in bf16; and
// tdpbf16ps has one defined order (Intel SDM, seen to hold on Emerald Rapids for all of 102,400 random sums): with pairs p =
// (a0, a1) of a tile row, C += sum_p a0 b0 + sum_p a1 b1, each sum a chain of FMAs from zero, subnormals taken as zero.
//   a16   two 16-groups per tile operation: the same order for any number of rows, so one row runs on tiles, too.
//   a4    one 16-group per operation. Sums inside it are exact (multiples of one unit, below 2^24 of them), so the only
//         rounding is C += group: the contract of moe.h, bit for bit.
//   FP8   128 columns in a tile, then times the block scale, added in binary32.
// NVFP4 panels become the second operand (lanes = output rows, as they are packed), dense rows the first (as they lie in the
// file), so neither is transposed.
//
// bf16 exponents: a decoded weight comes out of fp16 arithmetic and is taken over with the exponent 112 too small (a shift);
// rows of x carry the missing factor, as far as their largest element allows, and the rest stands in the row's factor.
#include <immintrin.h>

#include "codec/nvfp4.h"
#include "ops/gemm/panel.h"

namespace dsv4 {
namespace {

// The intrinsics of GCC 12 do not tell the compiler that they read memory.
#define TILE_LOAD(tile, base, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
// Rows of x come from L2 and are read once for every pair of panels: the hint keeps the decoded weights in L1 (+12 to 15 %).
#define TILE_LOAD_X(tile, base, stride) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile ::"r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(tile, base, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define TILE_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// Tiles of every kernel here: C[i][j] = tile 2i + j, first operands 4 and 5, second operands 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// fp16 with at most 7 mantissa bits, normal or zero -> bf16 times 2^-112.
inline __m512i half_to_bf16(__m512h v) {
  return _mm512_and_si512(_mm512_srai_epi16(_mm512_castph_si512(v), 3),
                          _mm512_set1_epi16(static_cast<int16_t>(0x8fff)));
}

inline __m512h half_of(uint16_t bits) { return _mm512_castsi512_ph(_mm512_set1_epi16(static_cast<int16_t>(bits))); }
constexpr uint16_t kHalf256 = 0x5c00;

#include "ops/gemm/tile_nvfp4.inl"
#include "ops/gemm/tile_dense.inl"

// ---- which kernel ----

template <int kPanels>
void dot_tiles(const PanelArgs* const* panels) {
  if (panels[0]->num_x == 0) return;
  if (panels[0]->w->cols == 0) {
    for (int p = 0; p < kPanels; ++p) __builtin_memset(panels[p]->out, 0, static_cast<size_t>(panels[p]->num_x) * 64);
    return;
  }
  switch (panels[0]->form) {
    case ActForm::kTileRows:
    case ActForm::kTileRowsNvfp4:
      return dot_nvfp4<kPanels>(panels);
    case ActForm::kTileCols:
      return dot_dense<kPanels, false>(panels);
    default:
      return dot_dense<kPanels, true>(panels);
  }
}

void enter(ActForm form, const std::byte* const* x, int64_t num_x, int64_t cols) {
  if (!is_tile_form(form) || num_x == 0) return;
  const TileConfig config =
      is_col_form(form) ? dense_config(x, num_x, cols) : nvfp4_config(form == ActForm::kTileRowsNvfp4, num_x);
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

// The unit as it was at start: clean registers are not saved with the thread.
void leave(ActForm form) {
  if (is_tile_form(form)) asm volatile("tilerelease" ::: "memory");
}

void dot(const PanelArgs& args) {
  if (!is_tile_form(args.form)) return panel_kernels_avx512().dot(args);
  const PanelArgs* panels[] = {&args};
  dot_tiles<1>(panels);
}

void dot_pair(const PanelArgs& a, const PanelArgs& b) {
  if (!is_tile_form(a.form)) {
    panel_kernels_avx512().dot(a);
    panel_kernels_avx512().dot(b);
    return;
  }
  const PanelArgs* panels[] = {&a, &b};
  // Bound by memory: one stream of weights at a time is faster (+6 to 9 % up to 16 rows).
  if (!is_col_form(a.form) && a.num_x <= 8) {
    dot_tiles<1>(panels);
    return dot_tiles<1>(panels + 1);
  }
  dot_tiles<2>(panels);
}

// ---- activation rows ----

// Elements k .. k + 15, zero from cols on.
inline __m512 load_x(const float* x, int64_t k, int64_t cols) {
  if (k + 16 <= cols) [[likely]]
    return _mm512_loadu_ps(x + k);
  return k >= cols ? _mm512_setzero_ps()
                   : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (cols - k)) - 1u), x + k);
}

// Powers of two: x * up is a bf16 value with exponent up to 126, and the sums of x * up times weights * 2^-112 come out too
// large by 1 / down. Rows below 2 are all treated alike.
struct RowScale {
  float up, down;
};

RowScale row_scale(const float* x, int64_t cols) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t k = 0; k < cols; k += 16) largest = _mm512_max_ps(_mm512_abs_ps(load_x(x, k, cols)), largest);
  const int exponent_bits = static_cast<int>(__builtin_bit_cast(uint32_t, _mm512_reduce_max_ps(largest)) >> 23);
  const int exponent = exponent_bits < 127 ? 0 : exponent_bits > 254 ? 127 : exponent_bits - 127;
  const auto power = [](int e) { return __builtin_bit_cast(float, static_cast<uint32_t>(e + 127) << 23); };
  return {power(126 - exponent), power(exponent - 14)};
}

// Upper halves of two vectors of binary32: even words from low, odd words from high.
inline __m512i pack_bf16(__m512 low, __m512 high) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16),
                         _mm512_and_si512(_mm512_castps_si512(high), upper));
}

void prepare_tile_row(const float* x, int64_t cols, std::byte* row) {
  const RowScale scale = row_scale(x, cols);
  const __m512 up = _mm512_set1_ps(scale.up);
  const int64_t padded = panel_padded_cols(cols);
  for (int64_t k = 0; k < padded; k += 32) {
    const __m512 a = _mm512_mul_ps(load_x(x, k, cols), up), b = _mm512_mul_ps(load_x(x, k + 16, cols), up);
    _mm512_store_si512(row + k * 2, pack_bf16(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)));
  }
  *reinterpret_cast<float*>(row + padded * 2) = scale.down;
}

#include "ops/gemm/act_quantize.inl"

// The row of the run-time rule as bf16 values e2m1 * sf * 2^112.
void prepare_tile_row_nvfp4(const float* x, int64_t cols, std::byte* row) {
  const GlobalScale global = quantize_act_groups(x, cols, [&](int64_t g, __m256i a, __m256i b, float sf) {
    const __m256 scale = _mm256_set1_ps(sf * 0x1p111f);  // the codes are doubled
    const __m256 va = _mm256_mul_ps(_mm256_cvtepi32_ps(a), scale), vb = _mm256_mul_ps(_mm256_cvtepi32_ps(b), scale);
    const __m256i low = _mm256_castps_si256(_mm256_permute2f128_ps(va, vb, 0x20));   // columns 0 .. 3 and 8 .. 11
    const __m256i high = _mm256_castps_si256(_mm256_permute2f128_ps(va, vb, 0x31));  // columns 4 .. 7 and 12 .. 15
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const __m256i packed = _mm256_or_si256(_mm256_srli_epi32(low, 16), _mm256_and_si256(high, upper));
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + g * 32), packed);
  });
  *reinterpret_cast<float*>(row + panel_padded_cols(cols) * 2) = global.value;
}

// Row of a block: pairs pair_stride bytes apart.
void prepare_tile_col(const float* x, int64_t cols, bool scaled, std::byte* out, int64_t pair_stride) {
  const RowScale scale = scaled ? row_scale(x, cols) : RowScale{1.0f, 1.0f};
  const __m512 up = _mm512_set1_ps(scale.up);
  const int64_t padded = panel_padded_cols(cols);
  for (int64_t k = 0; k < padded; k += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(load_x(x, k, cols), up));
    const __m256i row = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    if (pair_stride == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k * 2), row);
      continue;
    }
    alignas(32) uint32_t pairs[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), row);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) __builtin_memcpy(out + (k / 2 + i) * pair_stride, &pairs[i], 4);
  }
  __builtin_memcpy(out + padded / 2 * pair_stride, &scale.down, 4);
}

ActForm form(WeightFormat format, const ActHint& hint) {
  if (hint.a4) return hint.num_rows >= kMinTileRowsA4 ? ActForm::kTileRowsNvfp4 : ActForm::kNvfp4;
  if (hint.bf16) {
    if (format == WeightFormat::kNvfp4) return ActForm::kTileRows;
    if (format == WeightFormat::kFp8Block) return ActForm::kTileColsScaled;
    if (format == WeightFormat::kBf16) return ActForm::kTileCols;
  }
  return panel_kernels_avx512().form(format, hint);
}

void prepare(ActForm form, const float* x, int64_t cols, std::byte* out, int64_t pair_stride) {
  switch (form) {
    case ActForm::kTileRows:
      return prepare_tile_row(x, cols, out);
    case ActForm::kTileRowsNvfp4:
      return prepare_tile_row_nvfp4(x, cols, out);
    case ActForm::kTileCols:
      return prepare_tile_col(x, cols, false, out, pair_stride);
    case ActForm::kTileColsScaled:
      return prepare_tile_col(x, cols, true, out, pair_stride);
    default:
      return panel_kernels_avx512().prepare(form, x, cols, out, pair_stride);
  }
}

}  // namespace

const PanelKernels& panel_kernels_amx() {
  static const PanelKernels kernels = [] {
    PanelKernels k = panel_kernels_avx512();
    k.form = form;
    k.prepare = prepare;
    k.enter = enter;
    k.leave = leave;
    k.dot = dot;
    k.dot_pair = dot_pair;
    return k;
  }();
  return kernels;
}

}  // namespace dsv4
