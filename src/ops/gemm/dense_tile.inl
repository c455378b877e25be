// Dot products of up to 16 weight rows with a list of activation rows, lanes = consecutive k. Included once per instruction
// set, inside its unnamed namespace, after the format traits it is instantiated with:
//
//   struct Format {
//     static constexpr int kStep;                        columns per vector step
//     static constexpr int kWeightBytes, kActBytes;      bytes of one element
//     static constexpr bool kBlockScaled;                FP8: partial sums per 128 columns
//     using W, X;  W load_w(const std::byte*);  X load_x(const std::byte*);  Acc mul_add(Acc, W, X);
//   }
// and Acc with acc_zero, acc_load, acc_store, acc_fold, acc_scaled_add, and kTileTokens.
//
// Few rows of x decode weights on the fly; many rows decode four weight rows x 512 columns into L1 once. Both run the same
// chain of operations per (row, lane, x row): the accumulators of an unfinished chain are parked in scratch.

constexpr int64_t kDenseBlockCols = 512;
constexpr int64_t kScaleBlockCols = 128;
constexpr int kDenseChunk = 64;  // x rows per pass over the panel: 64 x 512 x 4 bytes stay in L2

template <class F>
inline typename F::W load_w_tail(const std::byte* w, int64_t count) {
  alignas(64) std::byte padded[F::kStep * F::kWeightBytes] = {};
  __builtin_memcpy(padded, w, static_cast<size_t>(count) * F::kWeightBytes);
  return F::load_w(padded);
}

template <class F>
inline typename F::X load_x_tail(const std::byte* x, int64_t count) {
  alignas(64) std::byte padded[F::kStep * F::kActBytes] = {};
  __builtin_memcpy(padded, x, static_cast<size_t>(count) * F::kActBytes);
  return F::load_x(padded);
}

// Columns [begin, end) of kRows rows of w into acc, decoding on the fly.
template <class F, int kRows, int kTokens>
inline void run_direct(const std::byte* w, int64_t w_stride, const std::byte* const* x, int64_t begin, int64_t end,
                       Acc (&acc)[kRows][kTokens]) {
  int64_t k = begin;
  for (; k + F::kStep <= end; k += F::kStep) {
    typename F::X xv[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) xv[t] = F::load_x(x[t] + k * F::kActBytes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename F::W wv = F::load_w(w + r * w_stride + k * F::kWeightBytes);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[r][t] = F::mul_add(acc[r][t], wv, xv[t]);
    }
  }
  if (k == end) return;
  for (int t = 0; t < kTokens; ++t) {
    const typename F::X xv = load_x_tail<F>(x[t] + k * F::kActBytes, end - k);
    for (int r = 0; r < kRows; ++r)
      acc[r][t] = F::mul_add(acc[r][t], load_w_tail<F>(w + r * w_stride + k * F::kWeightBytes, end - k), xv);
  }
}

template <class F, int kRows, int kTokens>
inline void dot_direct(const PanelArgs& args, int row, const std::byte* const* x, float* out) {
  const WeightView& v = *args.w;
  const int64_t stride = v.cols * F::kWeightBytes;
  const std::byte* w = static_cast<const std::byte*>(v.data) + (args.row_begin + row) * stride;
  Acc total[kRows][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) total[r][t] = acc_zero();
  if constexpr (F::kBlockScaled) {
    const float* scales = v.block_scales + (args.row_begin / kScaleBlockCols) * ((v.cols + kScaleBlockCols - 1) / kScaleBlockCols);
    for (int64_t begin = 0; begin < v.cols; begin += kScaleBlockCols) {
      const int64_t end = begin + kScaleBlockCols < v.cols ? begin + kScaleBlockCols : v.cols;
      Acc part[kRows][kTokens];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) part[r][t] = acc_zero();
      run_direct<F>(w, stride, x, begin, end, part);
      const float scale = scales[begin / kScaleBlockCols] * F::kDecodeFactor;
      for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) total[r][t] = acc_scaled_add(part[r][t], scale, total[r][t]);
    }
  } else {
    run_direct<F>(w, stride, x, 0, v.cols, total);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) out[t * kPanelRows + row + r] = acc_fold(total[r][t]);
}

template <class F, int kTokens>
inline void dot_direct_panel(const PanelArgs& args, const std::byte* const* x, float* out) {
  constexpr int kRows = kTokens == 1 ? 8 : 4;
  int row = 0;
  for (; row + kRows <= args.num_rows; row += kRows) dot_direct<F, kRows, kTokens>(args, row, x, out);
  for (; row < args.num_rows; ++row) dot_direct<F, 1, kTokens>(args, row, x, out);
}

// Parked accumulators and decoded weights of the blocked form.
template <class F>
struct DenseScratch {
  static constexpr int64_t kDecodedSteps = kDenseBlockCols / F::kStep;
  Acc acc[kPanelRows][kDenseChunk];
  typename F::W decoded[4][kDecodedSteps];
};

template <class F, int kTokens>
inline void run_decoded(const DenseScratch<F>& s, const std::byte* const* x, int64_t begin, int64_t end,
                        Acc (&acc)[4][kTokens]) {
  const int64_t full_steps = (end - begin) / F::kStep;
  for (int64_t step = 0; step < full_steps; ++step) {
    typename F::X xv[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) xv[t] = F::load_x(x[t] + (begin + step * F::kStep) * F::kActBytes);
#pragma GCC unroll 8
    for (int r = 0; r < 4; ++r) {
      const typename F::W wv = s.decoded[r][step];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[r][t] = F::mul_add(acc[r][t], wv, xv[t]);
    }
  }
  const int64_t k = begin + full_steps * F::kStep;
  if (k == end) return;
  for (int t = 0; t < kTokens; ++t) {
    const typename F::X xv = load_x_tail<F>(x[t] + k * F::kActBytes, end - k);
    for (int r = 0; r < 4; ++r) acc[r][t] = F::mul_add(acc[r][t], s.decoded[r][full_steps], xv);
  }
}

template <class F, int kTokens>
inline void dot_block(DenseScratch<F>& s, int row, int token, const std::byte* const* x, int64_t begin, int64_t end,
                      float scale) {
  Acc acc[4][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[r][t] = F::kBlockScaled ? acc_zero() : s.acc[row + r][token + t];
  run_decoded<F>(s, x, begin, end, acc);
#pragma GCC unroll 8
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      s.acc[row + r][token + t] =
          F::kBlockScaled ? acc_scaled_add(acc[r][t], scale, s.acc[row + r][token + t]) : acc[r][t];
}

template <class F>
void dot_blocked(const PanelArgs& args, const std::byte* const* x, int num_x, float* out) {
  static_assert(sizeof(DenseScratch<F>) <= kPanelScratchBytes);
  DenseScratch<F>& s = *reinterpret_cast<DenseScratch<F>*>(args.scratch);
  const WeightView& v = *args.w;
  const int64_t stride = v.cols * F::kWeightBytes;
  const std::byte* w = static_cast<const std::byte*>(v.data) + args.row_begin * stride;
  const int row_quads = (args.num_rows + 3) / 4;
  for (int r = 0; r < row_quads * 4; ++r)
    for (int t = 0; t < num_x; ++t) s.acc[r][t] = acc_zero();

  constexpr int64_t kBlock = F::kBlockScaled ? kScaleBlockCols : kDenseBlockCols;
  for (int64_t begin = 0; begin < v.cols; begin += kBlock) {
    const int64_t end = begin + kBlock < v.cols ? begin + kBlock : v.cols;
    float scale = 1.0f;
    if constexpr (F::kBlockScaled)
      scale = v.block_scales[(args.row_begin / kScaleBlockCols) * ((v.cols + kScaleBlockCols - 1) / kScaleBlockCols) +
                             begin / kScaleBlockCols] * F::kDecodeFactor;
    for (int quad = 0; quad < row_quads; ++quad) {
      for (int r = 0; r < 4; ++r) {
        const int row = quad * 4 + r < args.num_rows ? quad * 4 + r : args.num_rows - 1;
        const std::byte* w_row = w + row * stride;
        int64_t k = begin;
        for (; k + F::kStep <= end; k += F::kStep) s.decoded[r][(k - begin) / F::kStep] = F::load_w(w_row + k * F::kWeightBytes);
        if (k < end) s.decoded[r][(k - begin) / F::kStep] = load_w_tail<F>(w_row + k * F::kWeightBytes, end - k);
      }
      int token = 0;
      for (; token + kTileTokens <= num_x; token += kTileTokens)
        dot_block<F, kTileTokens>(s, quad * 4, token, x + token, begin, end, scale);
      for (; token < num_x; ++token) dot_block<F, 1>(s, quad * 4, token, x + token, begin, end, scale);
    }
  }
  for (int t = 0; t < num_x; ++t)
    for (int r = 0; r < args.num_rows; ++r) out[t * kPanelRows + r] = acc_fold(s.acc[r][t]);
}

template <class F>
void dot_dense(const PanelArgs& args) {
  int64_t begin = 0;
  while (begin < args.num_x) {
    const int64_t left = args.num_x - begin;
    const std::byte* const* x = args.x + begin;
    float* out = args.out + begin * kPanelRows;
    if (left >= 2 * kTileTokens) {
      const int count = static_cast<int>(left < kDenseChunk ? left : kDenseChunk);
      dot_blocked<F>(args, x, count, out);
      begin += count;
    } else if (left >= 3) {
      dot_direct_panel<F, 3>(args, x, out);
      begin += 3;
    } else if (left == 2) {
      dot_direct_panel<F, 2>(args, x, out);
      begin += 2;
    } else {
      dot_direct_panel<F, 1>(args, x, out);
      begin += 1;
    }
  }
}
