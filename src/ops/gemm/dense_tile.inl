// Dot products of up to 16 weight rows with a list of activation rows, lanes = consecutive k. Included once per instruction
// set, inside its unnamed namespace, after the format traits it is instantiated with:
//
//   struct Format {
//     static constexpr int kStep;                        columns per vector step
//     static constexpr int kWeightBytes, kActBytes;      bytes of one element
//     static constexpr bool kBlockScaled;                FP8: partial sums per 128 columns
//     using W, X;  W load_w(const std::byte*);  X load_x(const std::byte*);  Acc mul_add(Acc, W, X);
//   }
// and Acc with acc_zero, acc_scaled_add, acc_fold (acc_fold4: of four, in the same order), and kTileTokens.
//
// Few rows of x decode weights on the fly; many rows decode the panel's 16 weight rows x 256 columns once into L1, where a
// tile of x rows meets all of them. Both run the same chain of operations per (row, lane, x row): the accumulators of an
// unfinished chain are parked in scratch.

constexpr int64_t kDenseBlockCols = 256;
constexpr int64_t kScaleBlockCols = 128;
constexpr int kDenseChunk = 64;  // x rows per pass over the panel
// Fewer rows of x do not earn back the decoded copy. FP8 costs more to decode than the others.
template <class F>
constexpr int kMinBlocked = F::kBlockScaled ? 4 : 12;

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
  if (k == end) [[likely]]
    return;
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const typename F::X xv = load_x_tail<F>(x[t] + k * F::kActBytes, end - k);
#pragma GCC unroll 8
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
    const float* scales =
        v.block_scales + (args.row_begin / kScaleBlockCols) * ((v.cols + kScaleBlockCols - 1) / kScaleBlockCols);
    for (int64_t begin = 0; begin < v.cols; begin += kScaleBlockCols) {
      const int64_t end = begin + kScaleBlockCols < v.cols ? begin + kScaleBlockCols : v.cols;
      Acc part[kRows][kTokens];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) part[r][t] = acc_zero();
      run_direct<F>(w, stride, x, begin, end, part);
      const float scale = scales[begin / kScaleBlockCols] * F::kDecodeFactor;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) total[r][t] = acc_scaled_add(part[r][t], scale, total[r][t]);
    }
  } else {
    run_direct<F>(w, stride, x, 0, v.cols, total);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    float* to = out + t * kPanelRows + row;
    if constexpr (kRows == 1) {
      *to = acc_fold(total[0][t]);
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; r += 4)
        _mm_storeu_ps(to + r, acc_fold4(total[r][t], total[r + 1][t], total[r + 2][t], total[r + 3][t]));
    }
  }
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
  Acc acc[kDenseChunk][kPanelRows];
  typename F::W decoded[kPanelRows / 4][kDecodedSteps][4];
};

template <class F, int kTokens>
inline void run_decoded(const typename F::W (*decoded)[4], const std::byte* const* x, int64_t begin, int64_t end,
                        Acc (&acc)[4][kTokens]) {
  const int64_t full_steps = (end - begin) / F::kStep;
  for (int64_t step = 0; step < full_steps; ++step) {
    typename F::X xv[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) xv[t] = F::load_x(x[t] + (begin + step * F::kStep) * F::kActBytes);
#pragma GCC unroll 8
    for (int r = 0; r < 4; ++r) {
      const typename F::W wv = decoded[step][r];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[r][t] = F::mul_add(acc[r][t], wv, xv[t]);
    }
  }
  const int64_t k = begin + full_steps * F::kStep;
  if (k == end) [[likely]]
    return;
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const typename F::X xv = load_x_tail<F>(x[t] + k * F::kActBytes, end - k);
#pragma GCC unroll 8
    for (int r = 0; r < 4; ++r) acc[r][t] = F::mul_add(acc[r][t], decoded[full_steps][r], xv);
  }
}

template <class F, int kTokens>
inline void dot_block(DenseScratch<F>& s, int row, int token, const std::byte* const* x, int64_t begin, int64_t end,
                      float scale) {
  Acc acc[4][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[r][t] = F::kBlockScaled ? acc_zero() : s.acc[token + t][row + r];
  run_decoded<F>(s.decoded[row / 4], x, begin, end, acc);
#pragma GCC unroll 8
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      s.acc[token + t][row + r] =
          F::kBlockScaled ? acc_scaled_add(acc[r][t], scale, s.acc[token + t][row + r]) : acc[r][t];
}

template <class F>
void dot_blocked(const PanelArgs& args, const std::byte* const* x, int num_x, float* out) {
  static_assert(sizeof(DenseScratch<F>) <= kPanelScratchBytes);
  DenseScratch<F>& s = *reinterpret_cast<DenseScratch<F>*>(args.scratch);
  const WeightView& v = *args.w;
  const int64_t stride = v.cols * F::kWeightBytes;
  const std::byte* w = static_cast<const std::byte*>(v.data) + args.row_begin * stride;
  const int row_quads = (args.num_rows + 3) / 4;
  for (int t = 0; t < num_x; ++t)
    for (int r = 0; r < row_quads * 4; ++r) s.acc[t][r] = acc_zero();

  constexpr int64_t kBlock = F::kBlockScaled ? kScaleBlockCols : kDenseBlockCols;
  for (int64_t begin = 0; begin < v.cols; begin += kBlock) {
    const int64_t end = begin + kBlock < v.cols ? begin + kBlock : v.cols;
    float scale = 1.0f;
    if constexpr (F::kBlockScaled)
      scale = v.block_scales[(args.row_begin / kScaleBlockCols) * ((v.cols + kScaleBlockCols - 1) / kScaleBlockCols) +
                             begin / kScaleBlockCols] *
              F::kDecodeFactor;
    for (int r = 0; r < row_quads * 4; ++r) {
      const std::byte* w_row = w + (r < args.num_rows ? r : args.num_rows - 1) * stride;
      int64_t k = begin;
      for (; k + F::kStep <= end; k += F::kStep)
        s.decoded[r / 4][(k - begin) / F::kStep][r % 4] = F::load_w(w_row + k * F::kWeightBytes);
      if (k < end)
        s.decoded[r / 4][(k - begin) / F::kStep][r % 4] = load_w_tail<F>(w_row + k * F::kWeightBytes, end - k);
    }
    const auto tile = [&](auto tokens, int token) {
      for (int quad = 0; quad < row_quads; ++quad)
        dot_block<F, decltype(tokens)::value>(s, quad * 4, token, x + token, begin, end, scale);
    };
    int token = 0;
    for (; token + kTileTokens <= num_x; token += kTileTokens) tile(IntConstant<kTileTokens>{}, token);
    for (; token + 2 <= num_x; token += 2) tile(IntConstant<2>{}, token);
    if (token < num_x) tile(IntConstant<1>{}, token);
  }
  for (int t = 0; t < num_x; ++t) {
    const Acc* a = s.acc[t];
    for (int r = 0; r < row_quads * 4; r += 4)
      _mm_storeu_ps(out + t * kPanelRows + r, acc_fold4(a[r], a[r + 1], a[r + 2], a[r + 3]));
  }
}

template <class F>
void dot_dense(const PanelArgs& args) {
  int64_t begin = 0;
  while (begin < args.num_x) {
    const int64_t left = args.num_x - begin;
    const std::byte* const* x = args.x + begin;
    float* out = args.out + begin * kPanelRows;
    if (left >= kMinBlocked<F>) {
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
