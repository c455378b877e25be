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

// Tiles are configured while one exists: code outside finds the unit as it was at start.
class TileScope {
 public:
  explicit TileScope(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// fp16 with at most 7 mantissa bits, normal or zero -> bf16 times 2^-112.
inline __m512i half_to_bf16(__m512h v) {
  return _mm512_and_si512(_mm512_srai_epi16(_mm512_castph_si512(v), 3), _mm512_set1_epi16(static_cast<int16_t>(0x8fff)));
}

inline __m512h half_of(uint16_t bits) { return _mm512_castsi512_ph(_mm512_set1_epi16(static_cast<int16_t>(bits))); }
constexpr uint16_t kHalf256 = 0x5c00;

// ---- NVFP4: x rows are the first operand, decoded weights the second ----

constexpr int kBlockCols = 512;                       // columns decoded at a time: 16 KB a panel
constexpr int kPanelBlockBytes = kBlockCols / 2 * 64;
constexpr int kTailTokens = 32;

struct Nvfp4Scratch {
  std::byte weights[2][kPanelBlockBytes];             // [panel][pair of columns][16 rows][2] bf16
  float tail[2][kTailTokens][kPanelRows];             // sums of the last, partial tiles
};
static_assert(sizeof(Nvfp4Scratch) <= kPanelScratchBytes);

// e2m1 in fp16, twice: the look-up reads five bits, of which the fifth belongs to the next code.
alignas(64) constexpr uint16_t kE2m1Half[32] = {
    0x0000, 0x3800, 0x3c00, 0x3e00, 0x4000, 0x4200, 0x4400, 0x4600, 0x8000, 0xb800, 0xbc00, 0xbe00, 0xc000, 0xc200, 0xc400, 0xc600,
    0x0000, 0x3800, 0x3c00, 0x3e00, 0x4000, 0x4200, 0x4400, 0x4600, 0x8000, 0xb800, 0xbc00, 0xbe00, 0xc000, 0xc200, 0xc400, 0xc600};

alignas(64) constexpr uint8_t kSfLanes[64] = {0,  0, 0,  0, 1,  1, 1,  1, 2,  2, 2,  2, 3,  3, 3,  3, 4,  4, 4,  4, 5,  5,
                                              5,  5, 6,  6, 6,  6, 7,  7, 7,  7, 8,  8, 8,  8, 9,  9, 9,  9, 10, 10, 10, 10,
                                              11, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15};

// Records [first, first + count) of a panel. Row (b, j) of a record's words: columns 8b + j and 8b + 4 + j of 16 rows.
void decode_records(const std::byte* packed, int64_t first, int64_t count, std::byte* out) {
  const __m512i table = _mm512_load_si512(kE2m1Half);
  const __m512i sf_lanes = _mm512_load_si512(kSfLanes);
  for (int64_t rec = 0; rec < count; ++rec) {
    const std::byte* record = packed + (first + rec) * kPanelRecordBytes;
    for (int line = 0; line < kPanelRecordBytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(record + 16 * kPanelRecordBytes + line), _MM_HINT_T1);
    for (int group = 0; group < 4; ++group) {
      // Both halves of lane r: sf of row r << 7, the fp16 of sf / 256 (subnormal ones included).
      const __m512i sf_bytes = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(record + 512 + group * 16)));
      const __m512i sf_wide = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, sf_lanes, sf_bytes);
      const __m512h sf = _mm512_mul_ph(_mm512_castsi512_ph(_mm512_slli_epi16(sf_wide, 7)), half_of(kHalf256));
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        const __m512i codes = _mm512_load_si512(record + (group * 2 + block) * 64);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m512i e2m1 = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 4 * j), table);
          _mm512_store_si512(out, half_to_bf16(_mm512_mul_ph(_mm512_castsi512_ph(e2m1), sf)));
          out += 64;
        }
      }
    }
  }
}

// One row of x: elements and the factor that its sums still need.
inline const float* row_trailer(const std::byte* row, int64_t cols) {
  return reinterpret_cast<const float*>(row + panel_padded_cols(cols) * 2);
}

// C[token tile][panel] over num_cols decoded columns; c[token tile][panel]: parked sums, rows of 16.
template <int kTokenTiles, int kPanels, int kStep>
inline void run_nvfp4_tiles(const std::byte* x0, const std::byte* x1, int64_t x_stride, const std::byte* w0, const std::byte* w1,
                            int64_t num_cols, bool first, float* const (&c)[2][2]) {
  if (first) {
    TILE_ZERO(0);
    if constexpr (kPanels == 2) TILE_ZERO(1);
    if constexpr (kTokenTiles == 2) TILE_ZERO(2);
    if constexpr (kTokenTiles == 2 && kPanels == 2) TILE_ZERO(3);
  } else {
    TILE_LOAD(0, c[0][0], 64);
    if constexpr (kPanels == 2) TILE_LOAD(1, c[0][1], 64);
    if constexpr (kTokenTiles == 2) TILE_LOAD(2, c[1][0], 64);
    if constexpr (kTokenTiles == 2 && kPanels == 2) TILE_LOAD(3, c[1][1], 64);
  }
  for (int64_t k = 0; k < num_cols; k += kStep) {
    TILE_LOAD(4, x0 + k * 2, x_stride);
    TILE_LOAD(6, w0 + k * 32, 64);
    TILE_DOT(0, 4, 6);
    if constexpr (kPanels == 2) {
      TILE_LOAD(7, w1 + k * 32, 64);
      TILE_DOT(1, 4, 7);
    }
    if constexpr (kTokenTiles == 2) {
      TILE_LOAD(5, x1 + k * 2, x_stride);
      TILE_DOT(2, 5, 6);
      if constexpr (kPanels == 2) TILE_DOT(3, 5, 7);
    }
  }
  TILE_STORE(0, c[0][0], 64);
  if constexpr (kPanels == 2) TILE_STORE(1, c[0][1], 64);
  if constexpr (kTokenTiles == 2) TILE_STORE(2, c[1][0], 64);
  if constexpr (kTokenTiles == 2 && kPanels == 2) TILE_STORE(3, c[1][1], 64);
}

// All tiles of x against one decoded block. Sums are parked in out; the last, partial tiles cover the last 16 or 32 rows
// once more and park theirs in tail (then copied), so that no tile writes past the rows there are.
template <int kPanels, int kStep>
void run_nvfp4_block(const PanelArgs* const* panels, Nvfp4Scratch& s, int64_t begin, int64_t num_cols) {
  const PanelArgs& args = *panels[0];
  const int64_t x_stride = act_row_bytes(args.form, args.w->cols);
  const auto run = [&](int64_t t0, int64_t t1, bool to_tail) {
    const std::byte* x0 = args.x[0] + t0 * x_stride + begin * 2;
    const std::byte* x1 = args.x[0] + t1 * x_stride + begin * 2;
    float* c[2][2];
    for (int p = 0; p < kPanels; ++p) {
      c[0][p] = to_tail ? s.tail[p][0] : panels[p]->out + t0 * kPanelRows;
      c[1][p] = to_tail ? s.tail[p][16] : panels[p]->out + t1 * kPanelRows;
    }
    if (t1 > t0) run_nvfp4_tiles<2, kPanels, kStep>(x0, x1, x_stride, s.weights[0], s.weights[1], num_cols, begin == 0, c);
    else run_nvfp4_tiles<1, kPanels, kStep>(x0, x0, x_stride, s.weights[0], s.weights[1], num_cols, begin == 0, c);
  };
  if (args.num_x <= 16) return run(0, 0, false);
  if (args.num_x <= 32) return run(0, 16, false);
  int64_t t = 0;
  for (; t + 32 <= args.num_x; t += 32) run(t, t + 16, false);
  if (args.num_x - t > 16) run(args.num_x - 32, args.num_x - 16, true);
  else if (args.num_x > t) run(args.num_x - 16, args.num_x - 16, true);
}

template <int kPanels>
void dot_nvfp4(const PanelArgs* const* panels) {
  const PanelArgs& args = *panels[0];
  Nvfp4Scratch& s = *reinterpret_cast<Nvfp4Scratch*>(args.scratch);
  const bool a4 = args.form == ActForm::kTileRowsNvfp4;
  const int64_t padded = panel_padded_cols(args.w->cols);
  const int64_t num_x = args.num_x;
  TileConfig config;
  const int rows0 = num_x < 16 ? static_cast<int>(num_x) : 16;
  const int rows1 = num_x <= 16 ? 1 : num_x < 32 ? static_cast<int>(num_x - 16) : 16;
  const int step = a4 ? 16 : 32;
  for (int p = 0; p < 2; ++p) {
    config.set(p, rows0, 64);
    config.set(2 + p, rows1, 64);
    config.set(6 + p, step / 2, 64);
  }
  config.set(4, rows0, step * 2);
  config.set(5, rows1, step * 2);
  {
    const TileScope scope(config);
    for (int64_t begin = 0; begin < padded; begin += kBlockCols) {
      const int64_t num_cols = padded - begin < kBlockCols ? padded - begin : kBlockCols;
      for (int p = 0; p < kPanels; ++p)
        decode_records(panels[p]->packed, begin / kPanelRecordCols, num_cols / kPanelRecordCols, s.weights[p]);
      if (a4) run_nvfp4_block<kPanels, 16>(panels, s, begin, num_cols);
      else run_nvfp4_block<kPanels, 32>(panels, s, begin, num_cols);
    }
  }
  const int64_t tail = num_x > 32 ? num_x % 32 : 0;
  for (int p = 0; p < kPanels; ++p) {
    float* out = panels[p]->out;
    // Rows of the tail buffer are the last 16 or 32 of x; the earlier ones among them are done.
    if (tail > 0) __builtin_memcpy(out + (num_x - tail) * kPanelRows, s.tail[p][(tail > 16 ? 32 : 16) - tail], static_cast<size_t>(tail) * 64);
    for (int64_t t = 0; t < num_x; ++t) {
      const float factor = *row_trailer(args.x[t], args.w->cols);
      const float global = panels[p]->w->global.value;
      // a4: the tiles summed dot / 4; the contract multiplies the whole sum by (global_x * global_w) / 4.
      const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(out + t * kPanelRows), _mm512_set1_ps(a4 ? 4.0f : 1.0f));
      const float alpha = a4 ? factor * global * 0.25f : factor * global;
      _mm512_storeu_ps(out + t * kPanelRows, _mm512_mul_ps(sum, _mm512_set1_ps(alpha)));
    }
  }
}

// ---- dense formats: weight rows are the first operand, blocks of 16 rows of x the second ----

constexpr int kDenseStep = 32;
constexpr int kScaleBlockCols = 128;
constexpr int64_t kDenseTokens = 256;  // rows of x per pass over the panel

template <bool kFp8>
constexpr int64_t kDenseBlock = kFp8 ? kScaleBlockCols : 512;

struct DenseScratch {
  std::byte weights[2][kPanelRows * 512 * 2];              // [panel][row][column] bf16, rows kDenseBlock long
  float sum[2][kDenseTokens / 16][kPanelRows][16];         // [panel][block of x][row][token]
  float part[2][2][kPanelRows][16];                        // FP8: one block of columns, before its scale
};
static_assert(sizeof(DenseScratch) <= kPanelScratchBytes);

// e4m3 << 7 is fp16 with the exponent 8 too small, subnormals included.
inline __m512i decode_fp8(__m256i codes) {
  const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7);  // the sign stands in bits 15 and 14
  const __m512i bits = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  return half_to_bf16(_mm512_mul_ph(_mm512_castsi512_ph(bits), half_of(kHalf256)));
}

// Columns [begin, begin + block) of a panel's rows as bf16, zero past the matrix.
template <bool kFp8>
void load_dense_block(const PanelArgs& args, int64_t begin, std::byte* out) {
  const int64_t cols = args.w->cols;
  const int64_t count = cols - begin < kDenseBlock<kFp8> ? cols - begin : kDenseBlock<kFp8>;
  for (int row = 0; row < kPanelRows; ++row, out += kDenseBlock<kFp8> * 2) {
    const int64_t at = (args.row_begin + row) * cols + begin;
    for (int64_t k = 0; k < count; k += kDenseStep) {
      const int64_t left = row < args.num_rows ? count - k : 0;
      const __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
      if constexpr (kFp8) {
        const uint8_t* from = static_cast<const uint8_t*>(args.w->data) + at + k;
        _mm512_store_si512(out + k * 2, decode_fp8(_mm256_maskz_loadu_epi8(mask, mask == 0 ? nullptr : from)));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(args.w->data) + at + k;
        _mm512_store_si512(out + k * 2, _mm512_maskz_loadu_epi16(mask, mask == 0 ? nullptr : from));
      }
    }
  }
}

// A block of up to 16 rows of x: [pairs of columns][width][2] bf16, then a factor per row. Layout: panel.h.
struct XBlock {
  explicit XBlock(const std::byte* block, int64_t cols)
      : width(*reinterpret_cast<const int32_t*>(block)), pairs(block + 64), factors(pairs + panel_padded_cols(cols) / 2 * 4 * width) {}
  int width;
  const std::byte* pairs;
  const std::byte* factors;
};

// C[panel][block of x] (+)= weights x columns.
template <int kPanels, int kBlocks>
inline void run_dense_tiles(const std::byte* w0, const std::byte* w1, int64_t w_stride, const XBlock& x0, const XBlock& x1,
                            int64_t begin, int64_t num_cols) {
  const int64_t stride0 = x0.width * 4, stride1 = x1.width * 4;
  const std::byte* from0 = x0.pairs + begin / 2 * stride0;
  const std::byte* from1 = x1.pairs + begin / 2 * stride1;
  for (int64_t k = 0; k < num_cols; k += kDenseStep) {
    TILE_LOAD(4, w0 + k * 2, w_stride);
    TILE_LOAD(6, from0 + k / 2 * stride0, stride0);
    TILE_DOT(0, 4, 6);
    if constexpr (kPanels == 2) {
      TILE_LOAD(5, w1 + k * 2, w_stride);
      TILE_DOT(2, 5, 6);
    }
    if constexpr (kBlocks == 2) {
      TILE_LOAD(7, from1 + k / 2 * stride1, stride1);
      TILE_DOT(1, 4, 7);
      if constexpr (kPanels == 2) TILE_DOT(3, 5, 7);
    }
  }
}

// Tiles of C to or from rows of 16 floats.
template <int kPanels, int kBlocks, class At>
inline void load_tiles(const At& at) {
  TILE_LOAD(0, at(0, 0), 64);
  if constexpr (kBlocks == 2) TILE_LOAD(1, at(0, 1), 64);
  if constexpr (kPanels == 2) TILE_LOAD(2, at(1, 0), 64);
  if constexpr (kPanels == 2 && kBlocks == 2) TILE_LOAD(3, at(1, 1), 64);
}
template <int kPanels, int kBlocks, class At>
inline void store_tiles(const At& at) {
  TILE_STORE(0, at(0, 0), 64);
  if constexpr (kBlocks == 2) TILE_STORE(1, at(0, 1), 64);
  if constexpr (kPanels == 2) TILE_STORE(2, at(1, 0), 64);
  if constexpr (kPanels == 2 && kBlocks == 2) TILE_STORE(3, at(1, 1), 64);
}
inline void zero_tiles() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}

template <int kPanels, int kBlocks, bool kFp8>
void run_dense_block(DenseScratch& s, const std::byte* const (&w)[2], int64_t w_stride, const float (&scale)[2], int64_t block,
                     const XBlock& x0, const XBlock& x1, int64_t begin, int64_t num_cols) {
  const auto sum_at = [&](int p, int b) { return &s.sum[p][block + b][0][0]; };
  if (kFp8 || begin == 0) zero_tiles();
  else load_tiles<kPanels, kBlocks>(sum_at);
  run_dense_tiles<kPanels, kBlocks>(w[0], w[1], w_stride, x0, x1, begin, num_cols);
  if constexpr (!kFp8) return store_tiles<kPanels, kBlocks>(sum_at);
  store_tiles<kPanels, kBlocks>([&](int p, int b) { return &s.part[p][b][0][0]; });
  for (int p = 0; p < kPanels; ++p) {
    const __m512 factor = _mm512_set1_ps(scale[p]);
    for (int b = 0; b < kBlocks; ++b) {
      for (int row = 0; row < kPanelRows; ++row) {
        float* sum = s.sum[p][block + b][row];
        const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sum);
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(s.part[p][b][row]), factor, before));
      }
    }
  }
}

inline void transpose16(__m512 (&v)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // v[4i + c]: column c of each 128-bit lane, rows 4i .. 4i + 3
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    v[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    v[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    v[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    v[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // lanes l of v[c], v[4 + c], v[8 + c], v[12 + c] make up column 4l + c
    const __m512 low01 = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88), low23 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd), high23 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

template <int kPanels, bool kFp8>
void dot_dense_chunk(const PanelArgs* const* panels, int64_t token_begin, int64_t num_x) {
  const PanelArgs& args = *panels[0];
  DenseScratch& s = *reinterpret_cast<DenseScratch*>(args.scratch);
  const int64_t cols = args.w->cols, num_blocks = (num_x + 15) / 16;
  const auto x_block = [&](int64_t b) { return XBlock(args.x[token_begin + b * 16], cols); };
  const XBlock first = x_block(0), second = x_block(num_blocks > 1 ? 1 : 0);
  TileConfig config;
  for (int p = 0; p < 2; ++p) {
    config.set(2 * p, kPanelRows, first.width * 4);
    config.set(2 * p + 1, kPanelRows, second.width * 4);
    config.set(4 + p, kPanelRows, kDenseStep * 2);
  }
  config.set(6, kDenseStep / 2, first.width * 4);
  config.set(7, kDenseStep / 2, second.width * 4);
  {
    const TileScope scope(config);
    const int64_t num_scales = (cols + kScaleBlockCols - 1) / kScaleBlockCols;
    for (int64_t begin = 0; begin < cols; begin += kDenseBlock<kFp8>) {
      const int64_t left = cols - begin < kDenseBlock<kFp8> ? cols - begin : kDenseBlock<kFp8>;
      const int64_t num_cols = (left + kDenseStep - 1) / kDenseStep * kDenseStep;
      const std::byte* w[2] = {s.weights[0], s.weights[1]};
      int64_t w_stride = kDenseBlock<kFp8> * 2;
      float scale[2] = {1.0f, 1.0f};
      // bf16 rows are read where they lie if nothing comes back to them: 32 lines 2 cols bytes apart share few cache sets.
      const bool in_place = !kFp8 && num_blocks <= 2 && num_cols == left && panels[kPanels - 1]->num_rows == kPanelRows;
      for (int p = 0; p < kPanels; ++p) {
        const PanelArgs& panel = *panels[p];
        if (in_place) w[p] = static_cast<const std::byte*>(panel.w->data) + (panel.row_begin * cols + begin) * 2;
        else load_dense_block<kFp8>(panel, begin, s.weights[p]);
        if constexpr (kFp8)
          scale[p] = panel.w->block_scales[panel.row_begin / kScaleBlockCols * num_scales + begin / kScaleBlockCols];
      }
      if (in_place) w_stride = cols * 2;
      int64_t b = 0;
      for (; b + 2 <= num_blocks; b += 2)
        run_dense_block<kPanels, 2, kFp8>(s, w, w_stride, scale, b, x_block(b), x_block(b + 1), begin, num_cols);
      if (b < num_blocks) run_dense_block<kPanels, 1, kFp8>(s, w, w_stride, scale, b, x_block(b), x_block(b), begin, num_cols);
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      __m512 v[16];
#pragma GCC unroll 16
      for (int row = 0; row < kPanelRows; ++row) v[row] = _mm512_load_ps(s.sum[p][b][row]);
      transpose16(v);
      const float* factors = reinterpret_cast<const float*>(x_block(b).factors);
      float* out = panels[p]->out + (token_begin + b * 16) * kPanelRows;
      const int64_t count = num_x - b * 16 < 16 ? num_x - b * 16 : 16;
      for (int64_t t = 0; t < count; ++t) _mm512_storeu_ps(out + t * kPanelRows, _mm512_mul_ps(v[t], _mm512_set1_ps(factors[t])));
    }
  }
}

template <int kPanels, bool kFp8>
void dot_dense(const PanelArgs* const* panels) {
  for (int64_t begin = 0; begin < panels[0]->num_x; begin += kDenseTokens) {
    const int64_t left = panels[0]->num_x - begin;
    dot_dense_chunk<kPanels, kFp8>(panels, begin, left < kDenseTokens ? left : kDenseTokens);
  }
}

template <int kPanels>
void dot_tiles(const PanelArgs* const* panels) {
  if (panels[0]->num_x == 0) return;
  if (panels[0]->w->cols == 0) {
    for (int p = 0; p < kPanels; ++p) __builtin_memset(panels[p]->out, 0, static_cast<size_t>(panels[p]->num_x) * 64);
    return;
  }
  switch (panels[0]->form) {
    case ActForm::kTileRows:
    case ActForm::kTileRowsNvfp4: return dot_nvfp4<kPanels>(panels);
    case ActForm::kTileCols: return dot_dense<kPanels, false>(panels);
    default: return dot_dense<kPanels, true>(panels);
  }
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
  dot_tiles<2>(panels);
}

// ---- activation rows ----

// Elements k .. k + 15, zero from cols on.
inline __m512 load_x(const float* x, int64_t k, int64_t cols) {
  if (k + 16 <= cols) [[likely]] return _mm512_loadu_ps(x + k);
  return k >= cols ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (cols - k)) - 1u), x + k);
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
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_and_si512(_mm512_castps_si512(high), upper));
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
  const int64_t padded = panel_padded_cols(cols);
  for (int64_t k = 0; k < padded; k += 2, out += pair_stride) {
    const float a = k < cols ? x[k] * scale.up : 0.0f, b = k + 1 < cols ? x[k + 1] * scale.up : 0.0f;
    const uint32_t pair = __builtin_bit_cast(uint32_t, a) >> 16 | (__builtin_bit_cast(uint32_t, b) & 0xffff0000u);
    __builtin_memcpy(out, &pair, 4);
  }
  __builtin_memcpy(out, &scale.down, 4);
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
    case ActForm::kTileRows: return prepare_tile_row(x, cols, out);
    case ActForm::kTileRowsNvfp4: return prepare_tile_row_nvfp4(x, cols, out);
    case ActForm::kTileCols: return prepare_tile_col(x, cols, false, out, pair_stride);
    case ActForm::kTileColsScaled: return prepare_tile_col(x, cols, true, out, pair_stride);
    default: return panel_kernels_avx512().prepare(form, x, cols, out, pair_stride);
  }
}

}  // namespace

const PanelKernels& panel_kernels_amx() {
  static const PanelKernels kernels = [] {
    PanelKernels k = panel_kernels_avx512();
    k.form = form;
    k.prepare = prepare;
    k.dot = dot;
    k.dot_pair = dot_pair;
    return k;
  }();
  return kernels;
}

}  // namespace dsv4
