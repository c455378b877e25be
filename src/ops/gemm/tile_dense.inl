// FP8 and BF16 on AMX: weight rows are the first operand, as they lie in the file (FP8: decoded), blocks of 16 rows of x the
// second. Blocks of columns are loaded between the tile operations on the block before. Included in the unnamed namespace of
// panel_amx.cpp.

constexpr int kDenseStep = 32;
constexpr int kScaleBlockCols = 128;
constexpr int64_t kDenseTokens = 256;  // rows of x per pass over the panel
constexpr int64_t kDenseBlock = 256;   // columns loaded at a time

struct DenseScratch {
  std::byte weights[2][2][kPanelRows * kDenseBlock * 2];  // [block % 2][panel][row][column] bf16, rows kDenseBlock long
  float sum[2][kDenseTokens / 16][kPanelRows][16];        // [panel][block of x][row][token]
  float part[2][2][2][kPanelRows][16];                    // FP8: [run % 2][panel][block of x] before the scale
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
    const std::byte* from =
        static_cast<const std::byte*>(args.w->data) + ((args.row_begin + row) * cols + begin_) * kBytes;
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
      if constexpr (kFp8)
        _mm512_store_si512(out + k * 2, decode_fp8(_mm256_maskz_loadu_epi8(mask, p)));
      else
        _mm512_store_si512(out + k * 2, _mm512_maskz_loadu_epi16(mask, p));
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
      : width(*reinterpret_cast<const int32_t*>(block)),
        pairs(block + 64),
        factors(pairs + panel_padded_cols(cols) / 2 * 4 * width) {}
  int width;
  const std::byte* pairs;
  const std::byte* factors;
};

// C[panel][block of x] += weights x columns, the next block of weights loaded meanwhile.
template <int kPanels, int kBlocks, bool kFp8>
inline void run_dense_tiles(const std::byte* w0, const std::byte* w1, int64_t w_stride, const XBlock& x0,
                            const XBlock& x1, int64_t begin, int64_t num_cols, DenseLoader<kPanels, kFp8>& next,
                            int64_t rows_per_step) {
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
  int64_t run = 0;     // how many there have been
  int64_t block = -1;  // first block of x; -1: none
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
      float(*part)[16] = s.part[pending.run % 2][p][b];
      float(*sum)[16] = s.sum[p][pending.block + b];
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
    if (d.begin == 0)
      zero_tiles();
    else
      load_tiles<kPanels, kBlocks>(sum_at);
    run_dense_tiles<kPanels, kBlocks, kFp8>(d.w[0], d.w[1], d.w_stride, x0, x1, d.begin, d.num_cols, next,
                                            d.rows_per_step);
    store_tiles<kPanels, kBlocks>(sum_at);
  } else {
    for (int64_t k = 0; k < d.num_cols; k += kScaleBlockCols) {
      const int64_t num_cols = d.num_cols - k < kScaleBlockCols ? d.num_cols - k : kScaleBlockCols;
      zero_tiles();
      run_dense_tiles<kPanels, kBlocks, kFp8>(d.w[0] + k * 2, d.w[1] + k * 2, d.w_stride, x0, x1, d.begin + k, num_cols,
                                              next, d.rows_per_step);
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
    const __m512 low01 = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88),
                 low23 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd),
                 high23 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
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
  const bool in_place =
      !kFp8 && num_blocks <= 2 && cols % kDenseStep == 0 && panels[kPanels - 1]->num_rows == kPanelRows;
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
    for (; b + 2 <= num_blocks; b += 2)
      run_dense_block<kPanels, 2, kFp8>(s, d, b, x_block(b), x_block(b + 1), next, pending);
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
      for (int64_t t = 0; t < count; ++t)
        _mm512_storeu_ps(out + t * kPanelRows, _mm512_mul_ps(v[t], _mm512_set1_ps(factors[t])));
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
