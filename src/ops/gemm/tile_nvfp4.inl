// NVFP4 on AMX: rows of x are the first operand, decoded weights the second (lanes = output rows). Blocks of columns are
// decoded between the tile operations on the block before. Included in the unnamed namespace of panel_amx.cpp.

constexpr int kBlockCols = 256;  // columns decoded at a time
constexpr int kPanelBlockBytes = kBlockCols / 2 * 64;
constexpr int kTailTokens = 32;

struct Nvfp4Scratch {
  std::byte weights[2][2][kPanelBlockBytes];  // [block % 2][panel][pair of columns][16 rows][2] bf16
  float tail[2][kTailTokens][kPanelRows];     // sums of the last, partial tiles
};
static_assert(sizeof(Nvfp4Scratch) <= kPanelScratchBytes);

// e2m1 in fp16, twice: the look-up reads five bits, of which the fifth belongs to the next code.
alignas(64) constexpr uint16_t kE2m1Half[32] = {0x0000, 0x3800, 0x3c00, 0x3e00, 0x4000, 0x4200, 0x4400, 0x4600,
                                                0x8000, 0xb800, 0xbc00, 0xbe00, 0xc000, 0xc200, 0xc400, 0xc600,
                                                0x0000, 0x3800, 0x3c00, 0x3e00, 0x4000, 0x4200, 0x4400, 0x4600,
                                                0x8000, 0xb800, 0xbc00, 0xbe00, 0xc000, 0xc200, 0xc400, 0xc600};

alignas(64) constexpr uint8_t kSfLanes[64] = {0,  0,  0,  0,  1,  1,  1,  1,  2,  2,  2,  2,  3,  3,  3,  3,
                                              4,  4,  4,  4,  5,  5,  5,  5,  6,  6,  6,  6,  7,  7,  7,  7,
                                              8,  8,  8,  8,  9,  9,  9,  9,  10, 10, 10, 10, 11, 11, 11, 11,
                                              12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15};

// One group of a record. Row (b, j) of out: columns 8b + j and 8b + 4 + j of 16 rows.
inline void decode_group(const std::byte* record, int64_t group, std::byte* out) {
  const __m512i table = _mm512_load_si512(kE2m1Half);
  // Both halves of lane r: sf of row r << 7, the fp16 of sf / 256 (subnormal ones included).
  const __m512i sf_bytes =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(record + 512 + group * 16)));
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
    const bool past_end =
        begin + num_cols + kPrefetchRecords * kPanelRecordCols > panel_padded_cols(panels[0]->w->cols);
    ahead_ = kPrefetchRecords * kPanelRecordBytes + (past_end && neighbours ? (kPanels - 1) * panel_bytes : 0);
  }
  int64_t num_left() const { return num_groups_ - next_; }
  void decode(int64_t count) {  // of each panel
    const int64_t end = next_ + count < num_groups_ ? next_ + count : num_groups_;
    for (; next_ < end; ++next_) {
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* record = from_[p] + next_ / 4 * kPanelRecordBytes;
        prefetch_lines<true>(record + kNearRecords * kPanelRecordBytes);
        prefetch_lines<false>(record + ahead_);
        decode_group(record, next_ % 4, to_[p] + next_ * 512);
      }
    }
  }

 private:
  // A quarter of a record's lines (nine: the last quarter takes three). Two distances, into L1 and into L2: with either alone
  // one row of x reaches 60 to 69 % of the read stream, with both 72 % (docs/kernels/cpu.md).
  template <bool kIntoL1>
  void prefetch_lines(const std::byte* record) const {
    constexpr auto kHint = kIntoL1 ? _MM_HINT_T0 : _MM_HINT_T1;
    const char* lines = reinterpret_cast<const char*>(record + next_ % 4 * 128);
    _mm_prefetch(lines, kHint);
    _mm_prefetch(lines + 64, kHint);
    if (next_ % 4 == 3) _mm_prefetch(lines + 128, kHint);
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
void run_nvfp4_block(const PanelArgs* const* panels, Nvfp4Scratch& s, const Nvfp4Block& b,
                     BlockDecoder<kPanels>& next) {
  const PanelArgs& args = *panels[0];
  const int64_t x_stride = act_row_bytes(args.form, args.w->cols);
  const bool one_pair = args.num_x <= 32;
  const int64_t num_steps = (args.num_x + 31) / 32 * (b.num_cols / kStep);
  const int64_t groups_per_step = (next.num_left() + num_steps - 1) / num_steps;
  const auto tiles = [&](int64_t t0, int64_t t1, bool to_tail) {
    TileRun run{args.x[0] + t0 * x_stride + b.begin * 2,
                args.x[0] + t1 * x_stride + b.begin * 2,
                {},
                b.begin == 0,
                b.begin > 0 && !one_pair,
                b.last || !one_pair};
    for (int p = 0; p < kPanels; ++p) {
      run.c[0][p] = to_tail ? s.tail[p][0] : panels[p]->out + t0 * kPanelRows;
      run.c[1][p] = to_tail ? s.tail[p][16] : panels[p]->out + t1 * kPanelRows;
    }
    if (t1 > t0)
      run_nvfp4_tiles<2, kPanels, kStep>(run, x_stride, b.w, b.num_cols, next, groups_per_step);
    else
      run_nvfp4_tiles<1, kPanels, kStep>(run, x_stride, b.w, b.num_cols, next, groups_per_step);
  };
  if (one_pair) {
    tiles(0, args.num_x > 16 ? 16 : 0, false);
  } else {
    int64_t t = 0;
    for (; t + 32 <= args.num_x; t += 32) tiles(t, t + 16, false);
    if (args.num_x - t > 16)
      tiles(args.num_x - 32, args.num_x - 16, true);
    else if (args.num_x > t)
      tiles(args.num_x - 16, args.num_x - 16, true);
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
  const auto block_cols = [&](int64_t begin) {
    return padded - begin < block ? (padded > begin ? padded - begin : 0) : block;
  };
  BlockDecoder<kPanels> first(panels, s.weights[0], 0, block_cols(0));
  first.decode(first.num_left());
  for (int64_t begin = 0, idx = 0; begin < padded; begin += block, ++idx) {
    const int64_t after = begin + block;
    BlockDecoder<kPanels> next(panels, s.weights[(idx + 1) % 2], after, block_cols(after));
    const Nvfp4Block current{{s.weights[idx % 2][0], s.weights[idx % 2][1]}, begin, block_cols(begin), after >= padded};
    if (a4)
      run_nvfp4_block<kPanels, 16>(panels, s, current, next);
    else
      run_nvfp4_block<kPanels, 32>(panels, s, current, next);
  }
  const int64_t tail = num_x > 32 ? num_x % 32 : 0;
  for (int p = 0; p < kPanels; ++p) {
    float* out = panels[p]->out;
    // Rows of the tail buffer are the last 16 or 32 of x; the earlier ones among them are done.
    if (tail > 0)
      __builtin_memcpy(out + (num_x - tail) * kPanelRows, s.tail[p][(tail > 16 ? 32 : 16) - tail],
                       static_cast<size_t>(tail) * 64);
    for (int64_t t = 0; t < num_x; ++t) {
      const float factor = *row_trailer(args.x[t], args.w->cols);
      const float global = panels[p]->w->global.value;
      // a4: the tiles summed dot / 4; the contract multiplies the whole sum by (global_x * global_w) / 4. Else factor is a power of two,
      // undone first: folded into global it could take that below the normal numbers.
      const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(out + t * kPanelRows), _mm512_set1_ps(a4 ? 4.0f : factor));
      const float alpha = a4 ? factor * global * 0.25f : global;
      _mm512_storeu_ps(out + t * kPanelRows, _mm512_mul_ps(sum, _mm512_set1_ps(alpha)));
    }
  }
}
