// The quantisers and decoders that define quantize.h, against the codec, against each other and against binary64.
#include "ops/quantize/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/check.h"
#include "codec/fp8_block.h"
#include "ops/gemm/panel.h"
#include "ops/moe/swiglu.h"
#include "ops/op_test_util.h"
#include "ops/rope/rope.h"

namespace dsv4::test {
namespace {

constexpr GlobalMode kAllGlobals[] = {GlobalMode::kOne, GlobalMode::kGiven, GlobalMode::kPerRow,
                                      GlobalMode::kComputeRow};

// Rows of very different size with zeros of both signs; every seventh row is all zeros.
std::vector<float> test_rows(uint32_t seed, int64_t rows, int64_t cols) {
  std::mt19937 rng(seed);
  std::vector<float> x = random_floats(rng, rows * cols, 1.0f, true);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      float& v = x[r * cols + c];
      v = std::ldexp(v, static_cast<int>(r * 5 % 19) - 9);
      if (rng() % 64 == 0) v *= 64.0f;
      if (rng() % 64 == 0) v = rng() % 2 ? 0.0f : -0.0f;
      if (r % 7 == 6) v = 0.0f;
    }
  return x;
}

std::vector<bf16> to_bf16(const std::vector<float>& x) {
  std::vector<bf16> y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), encode_bf16);
  return y;
}

// Owns what QuantizedRows points to; every byte starts as 0xa5.
struct Results {
  std::vector<uint8_t> codes, sf;
  std::vector<bf16> y;
  std::vector<float> globals, row_global;
  QuantizedRows out;

  Results(int64_t rows, int64_t cols, RowFormat format, GlobalMode mode, SfLayout layout = SfLayout::kLinear,
          bool with_y = false, int64_t matrix_rows = 0) {
    out.format = format;
    out.global_mode = mode;
    out.sf_layout = layout;
    out.sf_matrix_rows = matrix_rows;
    codes.assign(static_cast<size_t>(format == RowFormat::kNvfp4 ? rows * cols / 2 : rows * cols), 0xa5);
    sf.assign(static_cast<size_t>(quantized_sf_bytes(out, rows, cols)), 0xa5);
    y.assign(static_cast<size_t>(rows * cols), bf16{0xa5a5});
    for (int64_t r = 0; r < rows; ++r) globals.push_back(0.011f * static_cast<float>(r % 5 + 1));
    row_global.assign(static_cast<size_t>(rows), -1.0f);
    out.codes = codes.data();
    out.sf = sf.data();
    out.y = with_y || format == RowFormat::kBf16 ? y.data() : nullptr;
    out.global = globals.data();
    out.row_global = row_global.data();
  }
  float global_of(int64_t row) const {
    switch (out.global_mode) {
      case GlobalMode::kOne:
        return 1.0f;
      case GlobalMode::kGiven:
        return globals[0];
      case GlobalMode::kPerRow:
        return globals[static_cast<size_t>(row)];
      case GlobalMode::kComputeRow:
        return row_global[static_cast<size_t>(row)];
    }
    return 0.0f;
  }
};

class Quantize : public ::testing::Test {
 protected:
  ThreadPool pool_{3};
  CpuContext context_{pool_};

  void quantize(const std::vector<float>& x, int64_t rows, int64_t cols, Results& results) {
    quantize_rows(QuantizeArgs{x.data(), true, nullptr, 0.0f, rows, cols, cols, results.out}, context_);
  }
};

TEST_F(Quantize, Nvfp4RowsAreTheCodecsGroupsInEveryGlobalMode) {
  constexpr int64_t kRows = 15, kCols = 80;
  const std::vector<float> x = test_rows(1, kRows, kCols);
  for (const GlobalMode mode : kAllGlobals) {
    Results got(kRows, kCols, RowFormat::kNvfp4, mode);
    quantize(x, kRows, kCols, got);
    for (int64_t r = 0; r < kRows; ++r) {
      const float* row = &x[r * kCols];
      if (mode == GlobalMode::kComputeRow) {
        EXPECT_EQ(got.row_global[r], nvfp4_global_scale(group_amax(row, kCols)).value);
      }
      const GlobalScale global{got.global_of(r)};
      for (int64_t g = 0; g < kCols / 16; ++g) {
        const Nvfp4Group want = encode_nvfp4_runtime_group(row + g * 16, global, nvfp4_rcp6(global));
        ASSERT_EQ(std::memcmp(want.codes, &got.codes[r * kCols / 2 + g * 8], 8), 0) << "row " << r << " group " << g;
        ASSERT_EQ(want.sf, got.sf[r * kCols / 16 + g]) << "row " << r << " group " << g;
      }
    }
  }
}

TEST_F(Quantize, Bf16AndBinary32RowsOfEqualValueGiveEqualBytes) {
  constexpr int64_t kRows = 9, kCols = 256, kStride = 264;
  const std::vector<float> x = test_rows(2, kRows, kCols);
  std::vector<bf16> strided(kRows * kStride, bf16{0x7fc0});
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < kCols; ++c) strided[r * kStride + c] = encode_bf16(x[r * kCols + c]);
  for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kFp8, RowFormat::kBf16}) {
    Results from_f32(kRows, kCols, format, GlobalMode::kOne), from_bf16(kRows, kCols, format, GlobalMode::kOne);
    quantize(x, kRows, kCols, from_f32);
    quantize_rows(QuantizeArgs{strided.data(), false, nullptr, 0.0f, kRows, kCols, kStride, from_bf16.out}, context_);
    EXPECT_EQ(from_f32.codes, from_bf16.codes);
    EXPECT_EQ(from_f32.sf, from_bf16.sf);
    EXPECT_EQ(from_f32.y, from_bf16.y);
  }
}

TEST_F(Quantize, TiledScalesAreTheLinearOnesMovedAndPaddingIsZero) {
  constexpr int64_t kCols = 80, kGroups = kCols / 16, kMatrixRows = 130, kMatrices = 2, kRows = kMatrixRows * kMatrices;
  const std::vector<float> x = test_rows(3, kRows, kCols);
  Results linear(kRows, kCols, RowFormat::kNvfp4, GlobalMode::kOne),
      tiled(kRows, kCols, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::k128x4, false, kMatrixRows);
  quantize(x, kRows, kCols, linear);
  quantize(x, kRows, kCols, tiled);
  EXPECT_EQ(linear.codes, tiled.codes);
  const int64_t matrix_bytes = sf_bytes(SfLayout::k128x4, kMatrixRows, kGroups);
  ASSERT_EQ(static_cast<int64_t>(tiled.sf.size()), kMatrices * matrix_bytes);
  std::vector<uint8_t> want(tiled.sf.size(), 0);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t g = 0; g < kGroups; ++g)
      want[r / kMatrixRows * matrix_bytes + sf_offset_128x4(r % kMatrixRows, g, kGroups)] = linear.sf[r * kGroups + g];
  EXPECT_EQ(tiled.sf, want);
}

TEST_F(Quantize, DecodingIsWithinHalfAStepOfTheInput) {
  constexpr int64_t kRows = 20, kCols = 512;
  const std::vector<float> x = test_rows(4, kRows, kCols);
  for (const GlobalMode mode : {GlobalMode::kOne, GlobalMode::kComputeRow})
    for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4}) {
      Results q(kRows, kCols, RowFormat::kNvfp4, mode, layout);
      quantize(x, kRows, kCols, q);
      std::vector<float> y(x.size());
      DequantizeArgs args{};
      args.codes = q.codes.data(), args.sf = q.sf.data(), args.global = q.row_global.data(), args.y = y.data(),
      args.y_is_f32 = true;
      args.global_mode = mode == GlobalMode::kOne ? GlobalMode::kOne : GlobalMode::kPerRow;
      args.sf_layout = layout, args.num_rows = args.num_out = kRows, args.cols = kCols;
      dequantize_rows(args, context_);
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t g = 0; g < kCols / 16; ++g) {
          const float amax = group_amax(&x[r * kCols + g * 16], 16), global = q.global_of(r);
          // sf is rounded to 3 bits (1/16) or to steps of 2^-9; the widest e2m1 step is 2 of 6, and 6 may stand for 6 / (1 - 1/16).
          const float bound = std::max(amax * (1.0f + 1.0f / 16) / 6.0f, 6.0f * 0x1p-10f * global);
          for (int c = 0; c < 16; ++c) {
            const float value = x[r * kCols + g * 16 + c];
            if (amax <= 448.0f * 6.0f * global) {
              EXPECT_LE(std::abs(y[r * kCols + g * 16 + c] - value), bound) << "row " << r << " group " << g;
            }
          }
        }
    }
}

TEST_F(Quantize, NanIsIgnoredByScalesAndInfinitySaturates) {
  constexpr int64_t kCols = 32;
  std::vector<float> x(kCols, 0.5f);
  x[0] = NAN, x[3] = 3.0f, x[16] = INFINITY, x[17] = -INFINITY;
  Results q(1, kCols, RowFormat::kNvfp4, GlobalMode::kOne);
  quantize(x, 1, kCols, q);
  EXPECT_EQ(q.sf[0], encode_ue4m3(3.0f / 6.0f));
  EXPECT_EQ(e2m1x2_even(q.codes[0]), 0x7);
  EXPECT_EQ(e2m1x2_odd(q.codes[1]), 0x7);  // 3 = 6 * .5
  EXPECT_EQ(q.sf[1], 0x7e);
  EXPECT_EQ(q.codes[8], 0xf7);
}

TEST_F(Quantize, Fp8BlocksAreTheCodecs) {
  constexpr int64_t kRows = 11, kCols = 256;
  const std::vector<float> x = test_rows(5, kRows, kCols);
  Results q(kRows, kCols, RowFormat::kFp8, GlobalMode::kOne);
  quantize(x, kRows, kCols, q);
  for (int64_t b = 0; b < kRows * kCols / 128; ++b) {
    const uint8_t scale = fp8_block_scale(group_amax(&x[b * 128], 128));
    ASSERT_EQ(q.sf[b], scale);
    for (int64_t i = b * 128; i < (b + 1) * 128; ++i) {
      ASSERT_EQ(q.codes[i], encode_fp8_block_element(x[i], scale));
      ASSERT_LE(std::abs(decode_fp8_block_element(q.codes[i], scale) - x[i]),
                std::max(std::abs(x[i]) / 16, decode_ue8m0(scale) * 0x1p-10f));
    }
  }
}

TEST_F(Quantize, NormRoundsOnceToBf16AndThenQuantises) {
  constexpr int64_t kRows = 6, kCols = 512;
  const std::vector<float> x = test_rows(6, kRows, kCols);
  std::mt19937 rng(7);
  const std::vector<bf16> input = to_bf16(x), weight = to_bf16(random_floats(rng, kCols, 1.0f, true));
  for (const GlobalMode mode : {GlobalMode::kOne, GlobalMode::kComputeRow}) {
    Results fused(kRows, kCols, RowFormat::kNvfp4, mode, SfLayout::kLinear, true),
        unfused(kRows, kCols, RowFormat::kNvfp4, mode);
    quantize_rows(QuantizeArgs{input.data(), false, weight.data(), 1e-6f, kRows, kCols, kCols, fused.out}, context_);
    for (int64_t r = 0; r < kRows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < kCols; ++c) sum += std::pow(static_cast<double>(x[r * kCols + c]), 2);
      for (int64_t c = 0; c < kCols; ++c) {
        const double want = decode_bf16(weight[c]) * x[r * kCols + c] / std::sqrt(sum / kCols + 1e-6);
        ASSERT_NEAR(decode_bf16(fused.y[r * kCols + c]), want, std::abs(want) * 0x1.01p-8 + 1e-30);
      }
    }
    quantize_rows(QuantizeArgs{fused.y.data(), false, nullptr, 0.0f, kRows, kCols, kCols, unfused.out}, context_);
    EXPECT_EQ(fused.codes, unfused.codes);
    EXPECT_EQ(fused.sf, unfused.sf);
    if (mode == GlobalMode::kComputeRow) {
      EXPECT_EQ(fused.row_global, unfused.row_global);
    }
  }
}

TEST_F(Quantize, FusedSwigluEqualsSwigluThenQuantise) {
  constexpr int64_t kRows = 8, kCols = 128, kStride = 136;
  std::mt19937 rng(8);
  const std::vector<bf16> gate = to_bf16(random_floats(rng, kRows * kStride, 6.0f, true)),
                          up = to_bf16(random_floats(rng, kRows * kStride, 6.0f, true));
  const std::vector<float> rho = random_floats(rng, kRows, 1.0f, false);
  for (const bool weighted : {true, false})
    for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kFp8, RowFormat::kBf16}) {
      std::vector<float> h(kRows * kCols);
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t c = 0; c < kCols; ++c)
          h[r * kCols + c] = swiglu(decode_bf16(gate[r * kStride + c]), decode_bf16(up[r * kStride + c]),
                                    weighted ? rho[r] : 1.0f, 10.0f);
      Results fused(kRows, kCols, format, GlobalMode::kOne), unfused(kRows, kCols, format, GlobalMode::kOne);
      swiglu_quantize(SwigluQuantizeArgs{gate.data(), up.data(), weighted ? rho.data() : nullptr, 10.0f, kRows, kCols,
                                         kStride, fused.out},
                      context_);
      quantize(h, kRows, kCols, unfused);
      EXPECT_EQ(fused.codes, unfused.codes);
      EXPECT_EQ(fused.sf, unfused.sf);
      EXPECT_EQ(fused.y, unfused.y);
    }
}

// Every instruction set of this machine, bit for bit, on every bf16 gate.
TEST_F(Quantize, VectorSwigluHasTheBitsOfTheDefinition) {
  for (const CpuIsa isa : vector_isas())
    for (const float limit : {10.0f, 7.3f, INFINITY}) {
      std::vector<float> gate(0x10000), up(gate.size()), got(gate.size());
      for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        gate[bits] = decode_bf16({static_cast<uint16_t>(bits)});
        up[bits] = static_cast<float>(static_cast<int>(bits * 7919 % 4001) - 2000) / 128.0f;
      }
      panel_kernels(isa)->swiglu(gate.data(), up.data(), 0.37f, limit, false, false, static_cast<int64_t>(gate.size()),
                                 got.data());
      int different = 0;
      for (size_t i = 0; i < gate.size(); ++i) {
        const float want = swiglu(gate[i], up[i], 0.37f, limit);
        different += std::isnan(want) ? !std::isnan(got[i]) : std::memcmp(&want, &got[i], 4) != 0;
      }
      EXPECT_EQ(different, 0) << cpu_isa_name(isa) << " limit " << limit;
    }
}

TEST_F(Quantize, InverseRopeUndoesTheRotationAndGroupsHeads) {
  constexpr int64_t kTokens = 5;
  constexpr int kHeads = 6, kHeadDim = 64, kRopeDim = 32, kHeadsPerGroup = 2, kPositions = 40;
  const RopeFreqs freqs = make_rope_freqs(kRopeDim, 10000.0, nullptr);
  std::vector<float> table(kPositions * kRopeDim);
  for (int p = 0; p < kPositions; ++p) rope_angles(freqs, p, &table[p * kRopeDim], &table[p * kRopeDim + kRopeDim / 2]);
  std::mt19937 rng(9);
  const std::vector<float> original = random_floats(rng, kTokens * kHeads * kHeadDim, 1.0f, true);
  std::vector<float> rotated = original;
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < kTokens; ++t) {
    positions.push_back(static_cast<int32_t>(t * 9 + 1));
    const float* cos = &table[positions.back() * kRopeDim];
    for (int h = 0; h < kHeads; ++h)
      rope_rotate(&rotated[(t * kHeads + h) * kHeadDim + kHeadDim - kRopeDim], cos, cos + kRopeDim / 2, kRopeDim / 2,
                  RopeDirection::kForward);
  }
  constexpr int64_t kCols = kHeadsPerGroup * kHeadDim, kRows = kTokens * kHeads / kHeadsPerGroup;
  const std::vector<bf16> input = to_bf16(rotated);
  Results plain(kRows, kCols, RowFormat::kBf16, GlobalMode::kOne),
      fused(kRows, kCols, RowFormat::kNvfp4, GlobalMode::kComputeRow),
      unfused(kRows, kCols, RowFormat::kNvfp4, GlobalMode::kComputeRow);
  InverseRopeQuantizeArgs args{input.data(), table.data(), positions.data(), kTokens,  kHeads,
                               kHeadDim,     kRopeDim,     kHeadsPerGroup,   plain.out};
  inverse_rope_quantize(args, context_);
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t c = 0; c < kCols; ++c) {
      const int64_t group = row / kTokens, token = row % kTokens, head = group * kHeadsPerGroup + c / kHeadDim;
      const float want = original[(token * kHeads + head) * kHeadDim + c % kHeadDim];
      const float bound = c % kHeadDim < kHeadDim - kRopeDim ? 0.0f : 0.04f;  // two bf16 roundings of values below 4
      EXPECT_NEAR(decode_bf16(plain.y[row * kCols + c]), want, bound);
    }
  args.out = fused.out;
  inverse_rope_quantize(args, context_);
  quantize_rows(QuantizeArgs{plain.y.data(), false, nullptr, 0.0f, kRows, kCols, kCols, unfused.out}, context_);
  EXPECT_EQ(fused.codes, unfused.codes);
  EXPECT_EQ(fused.sf, unfused.sf);
  EXPECT_EQ(fused.row_global, unfused.row_global);
}

TEST_F(Quantize, GatheredRowsAreTheDenseOnesAndBadIndicesAreCountedAndZero) {
  constexpr int64_t kRows = 200, kCols = 96;
  const std::vector<float> x = test_rows(10, kRows, kCols);
  const std::vector<int32_t> rows = {3, -1, 199, 0, 200, 3, -2, 77};
  for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4})
    for (const GlobalMode mode : {GlobalMode::kOne, GlobalMode::kGiven, GlobalMode::kPerRow}) {
      Results q(kRows, kCols, RowFormat::kNvfp4, mode, layout);
      quantize(x, kRows, kCols, q);
      std::vector<bf16> dense(kRows * kCols), gathered(rows.size() * kCols, bf16{0xa5a5});
      int32_t bad = 10;
      DequantizeArgs args{q.codes.data(), q.sf.data(), q.globals.data(), nullptr, nullptr, dense.data(),
                          false,          mode,        layout,           kRows,   kRows,   kCols};
      dequantize_rows(args, context_);
      args.rows = rows.data(), args.bad_rows = &bad, args.y = gathered.data(),
      args.num_out = static_cast<int64_t>(rows.size());
      dequantize_rows(args, context_);
      EXPECT_EQ(bad, 12);
      for (size_t i = 0; i < rows.size(); ++i)
        for (int64_t c = 0; c < kCols; ++c) {
          const bool present = rows[i] >= 0 && rows[i] < kRows;
          ASSERT_EQ(gathered[i * kCols + c], present ? dense[rows[i] * kCols + c] : bf16{0}) << "row " << rows[i];
        }
    }
}

TEST_F(Quantize, Fp8WeightBlocksScaleBothWays) {
  constexpr int64_t kRows = 131, kCols = 144;
  std::mt19937 rng(11);
  std::vector<uint8_t> codes(kRows * kCols);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(rng());
  const std::vector<float> scales = random_floats(rng, 4, 1.0f, false);
  std::vector<bf16> y(codes.size());
  dequantize_fp8_blocks({codes.data(), scales.data(), y.data(), kRows, kCols}, context_);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < kCols; ++c) {
      const bf16 want = encode_bf16(decode_e4m3(codes[r * kCols + c]) * scales[r / 128 * 2 + c / 128]);
      ASSERT_EQ(y[r * kCols + c], want);
    }
}

TEST_F(Quantize, ZeroRowsAreLegalAndOddColumnsAreRefused) {
  Results q(1, 128, RowFormat::kNvfp4, GlobalMode::kOne);
  const std::vector<float> x(128, 1.0f);
  EXPECT_NO_THROW(quantize(x, 0, 128, q));
  EXPECT_EQ(q.codes[0], 0xa5);
  EXPECT_THROW(quantize(x, 1, 24, q), Error);
  q.out.format = RowFormat::kFp8;
  EXPECT_THROW(quantize(x, 1, 64, q), Error);
  DequantizeArgs args{};
  args.cols = 24;
  EXPECT_THROW(dequantize_rows(args, context_), Error);
}

TEST_F(Quantize, CostCountsEveryByteOnce) {
  EXPECT_EQ(quantize_cost(2, 512, 2, RowFormat::kNvfp4).bytes, 2 * (1024 + 256 + 32));
  EXPECT_EQ(quantize_cost(2, 512, 4, RowFormat::kFp8).bytes, 2 * (2048 + 512 + 4));
  EXPECT_EQ(dequantize_cost(3, 512, 4).bytes, 3 * (256 + 32 + 2048));
}

}  // namespace
}  // namespace dsv4::test
