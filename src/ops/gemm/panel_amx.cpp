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
  return _mm512_and_si512(_mm512_srai_epi16(_mm512_castph_si512(v), 3), _mm512_set1_epi16(static_cast<int16_t>(0x8fff)));
}

inline __m512h half_of(uint16_t bits) { return _mm512_castsi512_ph(_mm512_set1_epi16(static_cast<int16_t>(bits))); }
constexpr uint16_t kHalf256 = 0x5c00;

// ---- NVFP4: x rows are the first operand, decoded weights the second ----

constexpr int kBlockCols = 256;                       // columns decoded at a time
constexpr int kPanelBlockBytes = kBlockCols / 2 * 64;
constexpr int kTailTokens = 32;

struct Nvfp4Scratch {
  std::byte weights[2][2][kPanelBlockBytes];          // [block % 2][panel][pair of columns][16 rows][2] bf16
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

// One group of a record. Row (b, j) of out: columns 8b + j and 8b + 4 + j of 16 rows.
inline void decode_group(const std::byte* record, int64_t group, std::byte* out) {
  const __m512i table = _mm512_load_si512(kE2m1Half);
  // Both halves of lane r: sf of row r << 7, the fp16 of sf / 256 (subnormal ones included).
  const __m512i sf_bytes = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(record + 512 + group * 16)));
  const __m512i sf_wide = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, _mm512_load_si512(kSfLanes), sf_bytes);
  const __m512h sf = _mm512_mul_ph(_mm512_castsi512_ph(_mm512_slli_epi16(sf_wide, 7)), half_of(kHalf256));
#pragma GCC unroll 2
  for (int block = 0; block < 2; ++block) {
    const __m512i codes = _mm512_load_si512(record + (group * 2 + block) * 64);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i e2m1 = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 4 * j), table);
      _mm512_store_si512(out + (block * 4 + j) * 64, half_to_bf16(_mm512_mul_ph(_mm512_castsi512_ph(e2m1), sf)));
    }
  }
}

// Decodes a block of columns of one or two panels group by group, between the tile operations on the block before it.
template <int kPanels>
class BlockDecoder {
 public:
  BlockDecoder(const PanelArgs* const* panels, std::byte (*to)[kPanelBlockBytes], int64_t begin, int64_t num_cols)
      : num_groups_(num_cols / 16) {
    for (int p = 0; p < kPanels; ++p) {
      from_[p] = panels[p]->packed + begin / kPanelRecordCols * kPanelRecordBytes;
      to_[p] = to[p];
    }
    // A panel's stream goes on in the panel after it, or after both if the two are neighbours.
    const int64_t panel_bytes = packed_panel_bytes(panels[0]->w->cols);
    const bool neighbours = panels[kPanels - 1]->packed == panels[0]->packed + (kPanels - 1) * panel_bytes;
    const bool past_end = begin + num_cols + kPrefetchRecords * kPanelRecordCols > panel_padded_cols(panels[0]->w->cols);
    ahead_ = kPrefetchRecords * kPanelRecordBytes + (past_end && neighbours ? (kPanels - 1) * panel_bytes : 0);
  }
  int64_t num_left() const { return num_groups_ - next_; }
  void decode(int64_t count) {  // of each panel
    const int64_t end = next_ + count < num_groups_ ? next_ + count : num_groups_;
    for (; next_ < end; ++next_) {
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* record = from_[p] + next_ / 4 * kPanelRecordBytes;
        prefetch_lines<_MM_HINT_T0>(record + kNearRecords * kPanelRecordBytes);
        prefetch_lines<_MM_HINT_T1>(record + ahead_);
        decode_group(record, next_ % 4, to_[p] + next_ * 512);
      }
    }
  }

 private:
  // A quarter of a record's lines (nine: the last quarter takes three). Two distances, into L1 and into L2: with either alone
  // one row of x reaches 60 to 69 % of the read stream, with both 72 % (docs/kernels/cpu.md).
  template <int kHint>
  void prefetch_lines(const std::byte* record) const {
    const char* lines = reinterpret_cast<const char*>(record + next_ % 4 * 128);
    _mm_prefetch(lines, static_cast<_mm_hint>(kHint));
    _mm_prefetch(lines + 64, static_cast<_mm_hint>(kHint));
    if (next_ % 4 == 3) _mm_prefetch(lines + 128, static_cast<_mm_hint>(kHint));
  }

  static constexpr int64_t kNearRecords = 2, kPrefetchRecords = 16;
  int64_t num_groups_, next_ = 0, ahead_ = 0;
  const std::byte* from_[kPanels];
  std::byte* to_[kPanels];
};

// One row of x: elements and the factor that its sums still need.
inline const float* row_trailer(const std::byte* row, int64_t cols) {
  return reinterpret_cast<const float*>(row + panel_padded_cols(cols) * 2);
}

// Where the sums of a pair of token tiles come from and go to; they stay in the tiles between blocks if no other pair needs them.
struct TileRun {
  const std::byte *x0, *x1;  // first column of the block
  float* c[2][2];            // [token tile][panel]: rows of 16
  bool zero, load, store;
};

// C[token tile][panel] += x * weights over num_cols decoded columns, the next block decoded meanwhile.
template <int kTokenTiles, int kPanels, int kStep>
inline void run_nvfp4_tiles(const TileRun& run, int64_t x_stride, const std::byte* const (&w)[2], int64_t num_cols,
                            BlockDecoder<kPanels>& next, int64_t groups_per_step) {
  if (run.zero) {
    TILE_ZERO(0);
    if constexpr (kPanels == 2) TILE_ZERO(1);
    if constexpr (kTokenTiles == 2) TILE_ZERO(2);
    if constexpr (kTokenTiles == 2 && kPanels == 2) TILE_ZERO(3);
  }
  if (run.load) {
    TILE_LOAD(0, run.c[0][0], 64);
    if constexpr (kPanels == 2) TILE_LOAD(1, run.c[0][1], 64);
    if constexpr (kTokenTiles == 2) TILE_LOAD(2, run.c[1][0], 64);
    if constexpr (kTokenTiles == 2 && kPanels == 2) TILE_LOAD(3, run.c[1][1], 64);
  }
  for (int64_t k = 0; k < num_cols; k += kStep) {
    TILE_LOAD_X(4, run.x0 + k * 2, x_stride);
    TILE_LOAD(6, w[0] + k * 32, 64);
    TILE_DOT(0, 4, 6);
    if constexpr (kPanels == 2) {
      TILE_LOAD(7, w[1] + k * 32, 64);
      TILE_DOT(1, 4, 7);
    }
    if constexpr (kTokenTiles == 2) {
      TILE_LOAD_X(5, run.x1 + k * 2, x_stride);
      TILE_DOT(2, 5, 6);
      if constexpr (kPanels == 2) TILE_DOT(3, 5, 7);
    }
    next.decode(groups_per_step);
  }
  if (!run.store) return;
  TILE_STORE(0, run.c[0][0], 64);
  if constexpr (kPanels == 2) TILE_STORE(1, run.c[0][1], 64);
  if constexpr (kTokenTiles == 2) TILE_STORE(2, run.c[1][0], 64);
  if constexpr (kTokenTiles == 2 && kPanels == 2) TILE_STORE(3, run.c[1][1], 64);
}

struct Nvfp4Block {
  const std::byte* w[2];  // decoded, per panel
  int64_t begin, num_cols;
  bool last;
};

// All tiles of x against one decoded block. Sums are parked in out; the last, partial tiles cover the last 16 or 32 rows
// once more and park theirs in tail (then copied), so that no tile writes past the rows there are.
template <int kPanels, int kStep>
void run_nvfp4_block(const PanelArgs* const* panels, Nvfp4Scratch& s, const Nvfp4Block& b, BlockDecoder<kPanels>& next) {
  const PanelArgs& args = *panels[0];
  const int64_t x_stride = act_row_bytes(args.form, args.w->cols);
  const bool one_pair = args.num_x <= 32;
  const int64_t num_steps = (args.num_x + 31) / 32 * (b.num_cols / kStep);
  const int64_t groups_per_step = (next.num_left() + num_steps - 1) / num_steps;
  const auto tiles = [&](int64_t t0, int64_t t1, bool to_tail) {
    TileRun run{args.x[0] + t0 * x_stride + b.begin * 2, args.x[0] + t1 * x_stride + b.begin * 2, {}, b.begin == 0,
                b.begin > 0 && !one_pair, b.last || !one_pair};
    for (int p = 0; p < kPanels; ++p) {
      run.c[0][p] = to_tail ? s.tail[p][0] : panels[p]->out + t0 * kPanelRows;
      run.c[1][p] = to_tail ? s.tail[p][16] : panels[p]->out + t1 * kPanelRows;
    }
    if (t1 > t0) run_nvfp4_tiles<2, kPanels, kStep>(run, x_stride, b.w, b.num_cols, next, groups_per_step);
    else run_nvfp4_tiles<1, kPanels, kStep>(run, x_stride, b.w, b.num_cols, next, groups_per_step);
  };
  if (one_pair) {
    tiles(0, args.num_x > 16 ? 16 : 0, false);
  } else {
    int64_t t = 0;
    for (; t + 32 <= args.num_x; t += 32) tiles(t, t + 16, false);
    if (args.num_x - t > 16) tiles(args.num_x - 32, args.num_x - 16, true);
    else if (args.num_x > t) tiles(args.num_x - 16, args.num_x - 16, true);
  }
  next.decode(next.num_left());
}

TileConfig nvfp4_config(bool a4, int64_t num_x) {
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
  return config;
}

template <int kPanels>
void dot_nvfp4(const PanelArgs* const* panels) {
  const PanelArgs& args = *panels[0];
  Nvfp4Scratch& s = *reinterpret_cast<Nvfp4Scratch*>(args.scratch);
  const bool a4 = args.form == ActForm::kTileRowsNvfp4;
  const int64_t padded = panel_padded_cols(args.w->cols);
  const int64_t num_x = args.num_x;
  // Few rows wait for the first block to be decoded: a short one. More rows park their sums after each block: a long one.
  const int64_t block = num_x <= 32 ? kBlockCols / 2 : kBlockCols;
  const auto block_cols = [&](int64_t begin) { return padded - begin < block ? (padded > begin ? padded - begin : 0) : block; };
  BlockDecoder<kPanels> first(panels, s.weights[0], 0, block_cols(0));
  first.decode(first.num_left());
  for (int64_t begin = 0, idx = 0; begin < padded; begin += block, ++idx) {
    const int64_t after = begin + block;
    BlockDecoder<kPanels> next(panels, s.weights[(idx + 1) % 2], after, block_cols(after));
    const Nvfp4Block current{{s.weights[idx % 2][0], s.weights[idx % 2][1]}, begin, block_cols(begin), after >= padded};
    if (a4) run_nvfp4_block<kPanels, 16>(panels, s, current, next);
    else run_nvfp4_block<kPanels, 32>(panels, s, current, next);
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
constexpr int64_t kDenseBlock = 256;  // columns loaded at a time

struct DenseScratch {
  std::byte weights[2][2][kPanelRows * kDenseBlock * 2];  // [block % 2][panel][row][column] bf16, rows kDenseBlock long
  float sum[2][kDenseTokens / 16][kPanelRows][16];           // [panel][block of x][row][token]
  float part[2][2][2][kPanelRows][16];                       // FP8: [run % 2][panel][block of x] before the scale
};
static_assert(sizeof(DenseScratch) <= kPanelScratchBytes);

// e4m3 << 7 is fp16 with the exponent 8 too small, subnormals included.
inline __m512i decode_fp8(__m256i codes) {
  const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7);  // the sign stands in bits 15 and 14
  const __m512i bits = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  return half_to_bf16(_mm512_mul_ph(_mm512_castsi512_ph(bits), half_of(kHalf256)));
}

// Columns [begin, begin + block) of the panels' rows as bf16, zero past the matrix; row by row, between tile operations.
template <int kPanels, bool kFp8>
class DenseLoader {
 public:
  DenseLoader(const PanelArgs* const* panels, DenseScratch& s, int64_t begin) : panels_(panels), begin_(begin) {
    const int64_t left = panels[0]->w->cols - begin;
    count_ = left < kDenseBlock ? left : kDenseBlock;
    num_rows_ = left > 0 ? kPanels * kPanelRows : 0;
    for (int p = 0; p < kPanels; ++p) to_[p] = s.weights[begin / kDenseBlock % 2][p];
  }
  int64_t num_left() const { return num_rows_ - next_; }
  void load(int64_t count) {
    const int64_t end = next_ + count < num_rows_ ? next_ + count : num_rows_;
    for (; next_ < end; ++next_) load_row(*panels_[next_ / kPanelRows], next_ % kPanelRows, to_[next_ / kPanelRows]);
  }

 private:
  void load_row(const PanelArgs& args, int64_t row, std::byte* out) const {
    constexpr int64_t kBytes = kFp8 ? 1 : 2;
    out += row * kDenseBlock * 2;
    const int64_t cols = args.w->cols;
    const std::byte* from = static_cast<const std::byte*>(args.w->data) + ((args.row_begin + row) * cols + begin_) * kBytes;
    const int64_t count = row < args.num_rows ? count_ : 0;
    // A row is a stream of its own; past its end the next one in this row's place is that of the next panels.
    const bool past_end = begin_ + kAhead >= cols;
    const std::byte* near = from + kDenseBlock * kBytes;
    const std::byte* ahead = from + (kAhead + (past_end ? (kPanels * kPanelRows - 1) * cols : 0)) * kBytes;
    for (int64_t line = 0; line < kDenseBlock * kBytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(near + line), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
    }
    for (int64_t k = 0; k < count_; k += kDenseStep) {
      const __mmask32 mask = count - k >= 32 ? 0xffffffffu : count <= k ? 0u : (1u << (count - k)) - 1u;
      const std::byte* p = mask == 0 ? nullptr : from + k * kBytes;
      if constexpr (kFp8) _mm512_store_si512(out + k * 2, decode_fp8(_mm256_maskz_loadu_epi8(mask, p)));
      else _mm512_store_si512(out + k * 2, _mm512_maskz_loadu_epi16(mask, p));
    }
  }

  static constexpr int64_t kAhead = 512;
  const PanelArgs* const* panels_;
  int64_t begin_, count_, num_rows_, next_ = 0;
  std::byte* to_[kPanels];
};

// A block of up to 16 rows of x: [pairs of columns][width][2] bf16, then a factor per row. Layout: panel.h.
struct XBlock {
  explicit XBlock(const std::byte* block, int64_t cols)
      : width(*reinterpret_cast<const int32_t*>(block)), pairs(block + 64), factors(pairs + panel_padded_cols(cols) / 2 * 4 * width) {}
  int width;
  const std::byte* pairs;
  const std::byte* factors;
};

// C[panel][block of x] += weights x columns, the next block of weights loaded meanwhile.
template <int kPanels, int kBlocks, bool kFp8>
inline void run_dense_tiles(const std::byte* w0, const std::byte* w1, int64_t w_stride, const XBlock& x0, const XBlock& x1,
                            int64_t begin, int64_t num_cols, DenseLoader<kPanels, kFp8>& next, int64_t rows_per_step) {
  const int64_t stride0 = x0.width * 4, stride1 = x1.width * 4;
  const std::byte* from0 = x0.pairs + begin / 2 * stride0;
  const std::byte* from1 = x1.pairs + begin / 2 * stride1;
  for (int64_t k = 0; k < num_cols; k += kDenseStep) {
    TILE_LOAD(4, w0 + k * 2, w_stride);
    TILE_LOAD_X(6, from0 + k / 2 * stride0, stride0);
    TILE_DOT(0, 4, 6);
    if constexpr (kPanels == 2) {
      TILE_LOAD(5, w1 + k * 2, w_stride);
      TILE_DOT(2, 5, 6);
    }
    if constexpr (kBlocks == 2) {
      TILE_LOAD_X(7, from1 + k / 2 * stride1, stride1);
      TILE_DOT(1, 4, 7);
      if constexpr (kPanels == 2) TILE_DOT(3, 5, 7);
    }
    next.load(rows_per_step);
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

// FP8: sums of one block of columns in scratch, to be scaled and added once they have left the store buffer.
struct PendingPart {
  int64_t run = 0;         // how many there have been
  int64_t block = -1;      // first block of x; -1: none
  int num_blocks = 0;
  __mmask16 mask[2] = {};  // the rows of x there are; the other lanes hold no numbers
  bool first = false;
  float scale[2] = {};
};

template <int kPanels>
inline void add_part(DenseScratch& s, const PendingPart& pending) {
  if (pending.block < 0) return;
  for (int p = 0; p < kPanels; ++p) {
    const __m512 factor = _mm512_set1_ps(pending.scale[p]);
    for (int b = 0; b < pending.num_blocks; ++b) {
      float (*part)[16] = s.part[pending.run % 2][p][b];
      float (*sum)[16] = s.sum[p][pending.block + b];
#pragma GCC unroll 4
      for (int row = 0; row < kPanelRows; ++row) {
        const __m512 before = pending.first ? _mm512_setzero_ps() : _mm512_load_ps(sum[row]);
        _mm512_store_ps(sum[row], _mm512_fmadd_ps(_mm512_maskz_load_ps(pending.mask[b], part[row]), factor, before));
      }
    }
  }
}

struct DenseBlock {
  const std::byte* w[2];
  int64_t w_stride, begin, num_cols, rows_per_step;
  const float* scales[2];  // FP8: of the block's first columns, per panel
};

template <int kPanels, int kBlocks, bool kFp8>
void run_dense_block(DenseScratch& s, const DenseBlock& d, int64_t block, const XBlock& x0, const XBlock& x1,
                     DenseLoader<kPanels, kFp8>& next, PendingPart& pending) {
  if constexpr (!kFp8) {
    const auto sum_at = [&](int p, int b) { return &s.sum[p][block + b][0][0]; };
    if (d.begin == 0) zero_tiles();
    else load_tiles<kPanels, kBlocks>(sum_at);
    run_dense_tiles<kPanels, kBlocks, kFp8>(d.w[0], d.w[1], d.w_stride, x0, x1, d.begin, d.num_cols, next, d.rows_per_step);
    store_tiles<kPanels, kBlocks>(sum_at);
  } else {
    for (int64_t k = 0; k < d.num_cols; k += kScaleBlockCols) {
      const int64_t num_cols = d.num_cols - k < kScaleBlockCols ? d.num_cols - k : kScaleBlockCols;
      zero_tiles();
      run_dense_tiles<kPanels, kBlocks, kFp8>(d.w[0] + k * 2, d.w[1] + k * 2, d.w_stride, x0, x1, d.begin + k, num_cols, next,
                                              d.rows_per_step);
      const int64_t run = pending.run + 1;
      store_tiles<kPanels, kBlocks>([&](int p, int b) { return &s.part[run % 2][p][b][0][0]; });
      add_part<kPanels>(s, pending);
      pending = {run, block, kBlocks, {}, d.begin + k == 0, {}};
      for (int p = 0; p < kPanels; ++p) pending.scale[p] = d.scales[p][k / kScaleBlockCols];
      pending.mask[0] = static_cast<__mmask16>((1u << x0.width) - 1u);
      pending.mask[1] = static_cast<__mmask16>((1u << x1.width) - 1u);
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

TileConfig dense_config(const std::byte* const* x, int64_t num_x, int64_t cols) {
  TileConfig config;
  const int width[2] = {XBlock(x[0], cols).width, XBlock(x[num_x > 16 ? 16 : 0], cols).width};
  for (int i = 0; i < 2; ++i) {
    config.set(i, kPanelRows, width[i] * 4);
    config.set(2 + i, kPanelRows, width[i] * 4);
    config.set(4 + i, kPanelRows, kDenseStep * 2);
    config.set(6 + i, kDenseStep / 2, width[i] * 4);
  }
  return config;
}

template <int kPanels, bool kFp8>
void dot_dense_chunk(const PanelArgs* const* panels, int64_t token_begin, int64_t num_x) {
  const PanelArgs& args = *panels[0];
  DenseScratch& s = *reinterpret_cast<DenseScratch*>(args.scratch);
  const int64_t cols = args.w->cols, num_blocks = (num_x + 15) / 16;
  const auto x_block = [&](int64_t b) { return XBlock(args.x[token_begin + b * 16], cols); };
  const int64_t num_scales = (cols + kScaleBlockCols - 1) / kScaleBlockCols;
  // bf16 rows are read where they lie if nothing comes back to them: 32 lines 2 cols bytes apart share few cache sets.
  const bool in_place = !kFp8 && num_blocks <= 2 && cols % kDenseStep == 0 && panels[kPanels - 1]->num_rows == kPanelRows;
  PendingPart pending;
  DenseLoader<kPanels, kFp8> first_weights(panels, s, in_place ? cols : 0);
  first_weights.load(first_weights.num_left());
  for (int64_t begin = 0; begin < cols; begin += kDenseBlock) {
    const int64_t left = cols - begin < kDenseBlock ? cols - begin : kDenseBlock;
    DenseBlock d{{}, kDenseBlock * 2, begin, (left + kDenseStep - 1) / kDenseStep * kDenseStep, 0, {}};
    for (int p = 0; p < kPanels; ++p) {
      const PanelArgs& panel = *panels[p];
      d.w[p] = in_place ? static_cast<const std::byte*>(panel.w->data) + (panel.row_begin * cols + begin) * 2
                        : s.weights[begin / kDenseBlock % 2][p];
      if constexpr (kFp8)
        d.scales[p] = panel.w->block_scales + panel.row_begin / kScaleBlockCols * num_scales + begin / kScaleBlockCols;
    }
    if (in_place) d.w_stride = cols * 2;
    DenseLoader<kPanels, kFp8> next(panels, s, in_place ? cols : begin + kDenseBlock);
    const int64_t num_steps = (num_blocks + 1) / 2 * (d.num_cols / kDenseStep);
    d.rows_per_step = (next.num_left() + num_steps - 1) / num_steps;
    int64_t b = 0;
    for (; b + 2 <= num_blocks; b += 2) run_dense_block<kPanels, 2, kFp8>(s, d, b, x_block(b), x_block(b + 1), next, pending);
    if (b < num_blocks) run_dense_block<kPanels, 1, kFp8>(s, d, b, x_block(b), x_block(b), next, pending);
    next.load(next.num_left());
  }
  add_part<kPanels>(s, pending);
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

void enter(ActForm form, const std::byte* const* x, int64_t num_x, int64_t cols) {
  if (!is_tile_form(form) || num_x == 0) return;
  const TileConfig config = is_col_form(form) ? dense_config(x, num_x, cols) : nvfp4_config(form == ActForm::kTileRowsNvfp4, num_x);
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
    k.enter = enter;
    k.leave = leave;
    k.dot = dot;
    k.dot_pair = dot_pair;
    return k;
  }();
  return kernels;
}

}  // namespace dsv4
