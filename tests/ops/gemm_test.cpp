// gemm: every instruction set against the double-sum reference, and the promises about batch size, threads and packing.
#include "ops/gemm/gemm.h"

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/gemm/gemm_pack.h"
#include "ops/op_test_util.h"

namespace dsv4::test {
namespace {

struct Shape {
  int64_t rows, cols;
};

// Odd rows, one panel, several; columns below, at and past every block and record boundary (all multiples of 16).
constexpr Shape kShapes[] = {{1, 16},   {5, 48},   {16, 64},  {17, 80},   {33, 128},
                             {40, 208}, {96, 256}, {31, 528}, {130, 1040}};

std::vector<float> run_gemm(const Weight& w, const std::vector<float>& x, int64_t num_tokens, CpuIsa isa, int threads,
                            bool round_output, bool x_is_bf16) {
  ThreadPool pool(threads);
  std::vector<float> y(static_cast<size_t>(num_tokens * w.view.rows), -1.0f);
  gemm({x.data(), &w, y.data(), num_tokens, w.view.cols, w.view.rows, round_output, x_is_bf16}, {pool, isa});
  return y;
}

// sum_k |x[k] * w[row, k]|: what the rounding errors of any summation order are proportional to.
double absolute_sum(const Weight& w, const float* x, int64_t row) {
  double sum = 0.0;
  for (int64_t k = 0; k < w.view.cols; ++k) sum += std::abs(static_cast<double>(x[k]) * decode_weight(w.view, row, k));
  return sum;
}

void pack(Weight& w, CpuIsa isa) {
  ThreadPool pool(2);
  Weight* list[] = {&w};
  pack_weights(list, {pool, isa});
}

class GemmParity : public testing::TestWithParam<std::tuple<WeightFormat, bool>> {};

TEST_P(GemmParity, EveryIsaMatchesReference) {
  const auto [format, bf16_values] = GetParam();
  std::mt19937 rng(1);
  for (const Shape& shape : kShapes) {
    OwnedWeight owned = random_weight(rng, format, shape.rows, shape.cols);
    for (int64_t num_tokens : {1, 2, 3, 4, 5, 7, 9, 13, 70}) {
      const std::vector<float> x = random_floats(rng, num_tokens * shape.cols, 1.0f, bf16_values);
      const std::vector<float> expected = run_gemm(owned.weight, x, num_tokens, CpuIsa::kReference, 1, false, false);
      for (CpuIsa isa : vector_isas()) {
        for (bool packed : {false, true}) {
          Weight w = owned.weight;
          if (packed) pack(w, isa);
          if (packed && !w.packed) continue;
          const std::vector<float> y = run_gemm(w, x, num_tokens, isa, 1, false, bf16_values);
          // n products and sums, each rounded: |error| <= (n + 4) * 2^-24 * sum |x w|, whatever the order; the 4 are the
          // scales and the final rounding. A dot product of bf16 pairs flushes subnormals: far below this bound here.
          for (int64_t t = 0; t < num_tokens; ++t) {
            for (int64_t r = 0; r < shape.rows; ++r) {
              const double bound =
                  static_cast<double>(shape.cols + 4) * 0x1p-24 * absolute_sum(w, &x[t * shape.cols], r);
              ASSERT_NEAR(y[t * shape.rows + r], expected[t * shape.rows + r], bound)
                  << cpu_isa_name(isa) << (packed ? " packed " : " ") << shape.rows << "x" << shape.cols << " tokens "
                  << num_tokens << " at " << t << ", " << r;
            }
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, GemmParity, testing::Combine(testing::ValuesIn(kAllFormats), testing::Bool()),
                         [](const auto& info) {
                           return format_name(std::get<0>(info.param)) +
                                  (std::get<1>(info.param) ? "_bf16_x" : "_f32_x");
                         });

TEST(Gemm, Nvfp4ActivationsAreBitwiseEqualToReference) {
  std::mt19937 rng(10);
  for (const Shape& shape : kShapes) {
    OwnedWeight owned = random_weight(rng, WeightFormat::kNvfp4, shape.rows, shape.cols);
    for (int64_t num_tokens = 1; num_tokens <= 80; num_tokens += num_tokens < 13 ? 1 : 16) {
      const std::vector<float> x = random_floats(rng, num_tokens * shape.cols, 1.0f, false);
      for (CpuIsa isa : vector_isas()) {
        Weight packed = owned.weight;
        pack(packed, isa);
        for (const Weight* w : {&owned.weight, &packed}) {
          std::vector<std::vector<float>> results;
          for (CpuIsa which : {CpuIsa::kReference, isa}) {
            ThreadPool pool(2);
            results.emplace_back(num_tokens * shape.rows);
            gemm({x.data(), w, results.back().data(), num_tokens, shape.cols, shape.rows, false, false, true},
                 {pool, which});
          }
          ASSERT_EQ(0, std::memcmp(results[0].data(), results[1].data(), results[0].size() * 4))
              << cpu_isa_name(isa) << " " << shape.rows << "x" << shape.cols << " tokens " << num_tokens;
        }
      }
    }
  }
}

// Rows are scaled by powers of two on some paths: no size of the values may show, and what is not finite stays so.
TEST(Gemm, RowsOfAnySizeMatchReference) {
  std::mt19937 rng(11);
  constexpr int64_t kRows = 24, kCols = 144;
  const float sizes[] = {1.0f, 0.0f, 0x1p100f, 0x1p-100f, 0x1p14f, 0x1p-14f, INFINITY, NAN};
  constexpr int64_t kTokens = std::size(sizes);
  for (WeightFormat format : kAllFormats) {
    OwnedWeight owned = random_weight(rng, format, kRows, kCols);
    std::vector<float> x = random_floats(rng, kTokens * kCols, 1.0f, true);
    for (int64_t t = 0; t < kTokens; ++t) {
      if (std::isfinite(sizes[t])) {
        for (int64_t k = 0; k < kCols; ++k) x[t * kCols + k] *= sizes[t];
      } else {
        x[t * kCols + 77] = sizes[t];
      }
    }
    const std::vector<float> expected = run_gemm(owned.weight, x, kTokens, CpuIsa::kReference, 1, false, true);
    for (CpuIsa isa : vector_isas()) {
      const std::vector<float> y = run_gemm(owned.weight, x, kTokens, isa, 1, false, true);
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t r = 0; r < kRows; ++r) {
          const float want = expected[t * kRows + r], got = y[t * kRows + r];
          SCOPED_TRACE(std::string(cpu_isa_name(isa)) + " " + format_name(format) + " row of size " +
                       std::to_string(sizes[t]));
          if (std::isnan(want))
            ASSERT_TRUE(std::isnan(got));
          else if (std::isinf(want))
            ASSERT_EQ(got, want);
          else
            ASSERT_NEAR(got, want,
                        static_cast<double>(kCols + 4) * 0x1p-24 * absolute_sum(owned.weight, &x[t * kCols], r));
        }
      }
    }
  }
}

// The order of panel_amx.cpp, one operation at a time: 32 columns as two chains of FMAs, then one addition.
float tile_order_sum(const Weight& w, const float* x, int64_t row) {
  const WeightView& v = w.view;
  const bool nvfp4 = v.format == WeightFormat::kNvfp4, fp8 = v.format == WeightFormat::kFp8Block;
  const auto weight = [&](int64_t k) {  // without the scales that come after the sums
    if (nvfp4) {
      const uint8_t byte = static_cast<const uint8_t*>(v.data)[(row * v.cols + k) / 2];
      return decode_e2m1(k % 2 == 0 ? e2m1x2_even(byte) : e2m1x2_odd(byte)) *
             decode_ue4m3(v.sf[(row * v.cols + k) / 16]);
    }
    if (fp8) return decode_e4m3(static_cast<const uint8_t*>(v.data)[row * v.cols + k]);
    return decode_bf16(static_cast<const bf16*>(v.data)[row * v.cols + k]);
  };
  float total = 0.0f, sum = 0.0f;
  for (int64_t begin = 0; begin < v.cols; begin += 32) {
    float chain[2] = {0.0f, 0.0f};
    for (int64_t k = begin; k < std::min(begin + 32, v.cols); ++k) {
      // Pairs are neighbours in dense rows, and columns 8b + j, 8b + 4 + j in NVFP4.
      float& which = chain[nvfp4 ? k / 4 % 2 : k % 2];
      which = std::fma(weight(k), x[k], which);
    }
    sum += chain[0] + chain[1];
    if (fp8 && (begin % 128 == 96 || begin + 32 >= v.cols)) {
      total = std::fma(sum, v.block_scales[row / 128 * ((v.cols + 127) / 128) + begin / 128], total);
      sum = 0.0f;
    }
  }
  return fp8 ? total : nvfp4 ? sum * v.global.value : sum;
}

TEST(GemmAmx, SumsAreInTheDocumentedOrderBitForBit) {
  if (best_cpu_isa() < CpuIsa::kAmx) GTEST_SKIP() << "this machine has " << cpu_isa_name(best_cpu_isa()) << ", not amx";
  std::mt19937 rng(12);
  for (WeightFormat format : {WeightFormat::kBf16, WeightFormat::kFp8Block, WeightFormat::kNvfp4}) {
    for (const Shape& shape : kShapes) {
      OwnedWeight owned = random_weight(rng, format, shape.rows, shape.cols);
      Weight packed = owned.weight;
      pack(packed, CpuIsa::kAmx);
      for (int64_t num_tokens : {1, 5, 16, 31, 33, 70}) {
        const std::vector<float> x = random_floats(rng, num_tokens * shape.cols, 1.0f, true);
        for (const Weight* w : {&owned.weight, &packed}) {
          const std::vector<float> y = run_gemm(*w, x, num_tokens, CpuIsa::kAmx, 1, false, true);
          for (int64_t t = 0; t < num_tokens; ++t)
            for (int64_t r = 0; r < shape.rows; ++r)
              ASSERT_EQ(y[t * shape.rows + r], tile_order_sum(owned.weight, &x[t * shape.cols], r))
                  << format_name(format) << " " << shape.rows << "x" << shape.cols << " tokens " << num_tokens << " at "
                  << t << ", " << r;
        }
      }
    }
  }
}

TEST(GemmAmx, ActivationsThatAreNoBf16ValuesKeepBinary32Products) {
  if (best_cpu_isa() < CpuIsa::kAmx) GTEST_SKIP() << "this machine has " << cpu_isa_name(best_cpu_isa()) << ", not amx";
  std::mt19937 rng(13);
  for (WeightFormat format : kAllFormats) {
    OwnedWeight owned = random_weight(rng, format, 33, 208);
    const std::vector<float> x = random_floats(rng, 20 * 208, 1.0f, false);
    EXPECT_EQ(run_gemm(owned.weight, x, 20, CpuIsa::kAmx, 1, false, false),
              run_gemm(owned.weight, x, 20, CpuIsa::kAvx512, 1, false, false));
  }
}

TEST(Gemm, ResultOfATokenDependsOnNeitherBatchNorThreadsNorPacking) {
  std::mt19937 rng(2);
  constexpr int64_t kTokens = 150;
  for (WeightFormat format : kAllFormats) {
    for (const Shape& shape : {Shape{70, 592}, Shape{256, 256}}) {
      OwnedWeight owned = random_weight(rng, format, shape.rows, shape.cols);
      for (CpuIsa isa : vector_isas()) {
        for (bool bf16_values : {false, true}) {
          const std::vector<float> x = random_floats(rng, kTokens * shape.cols, 1.0f, bf16_values);
          std::vector<float> one_by_one;
          for (int64_t t = 0; t < kTokens; ++t) {
            const std::vector<float> row(x.begin() + t * shape.cols, x.begin() + (t + 1) * shape.cols);
            const std::vector<float> y = run_gemm(owned.weight, row, 1, isa, 1, true, bf16_values);
            one_by_one.insert(one_by_one.end(), y.begin(), y.end());
          }
          Weight packed = owned.weight;
          pack(packed, isa);
          for (int64_t num_tokens : {2, 3, 4, 6, 8, 11, 12, 16, 17, 32, 33, 49, 150}) {
            for (int threads : {1, 2, 5}) {
              const std::vector<float> y = run_gemm(packed, x, num_tokens, isa, threads, true, bf16_values);
              ASSERT_EQ(0, std::memcmp(y.data(), one_by_one.data(), y.size() * 4))
                  << cpu_isa_name(isa) << " " << format_name(format) << " " << num_tokens << " tokens, " << threads
                  << " threads";
            }
          }
        }
      }
    }
  }
}

TEST(Gemm, StridesAreRespectedAndNothingElseIsWritten) {
  std::mt19937 rng(3);
  OwnedWeight owned = random_weight(rng, WeightFormat::kNvfp4, 21, 48);
  const std::vector<float> x = random_floats(rng, 3 * 50, 1.0f, true);
  ThreadPool pool(2);
  for (CpuIsa isa : vector_isas()) {
    std::vector<float> y(3 * 30, -7.0f), dense(21);
    gemm({x.data(), &owned.weight, y.data(), 3, 50, 30, false, true}, {pool, isa});
    for (int t = 0; t < 3; ++t) {
      gemm({x.data() + t * 50, &owned.weight, dense.data(), 1, 48, 21, false, true}, {pool, isa});
      EXPECT_EQ(0, std::memcmp(dense.data(), &y[t * 30], 21 * 4));
      for (int r = 21; r < 30; ++r) EXPECT_EQ(y[t * 30 + r], -7.0f);
    }
  }
}

TEST(Gemm, OutputIsRoundedToBf16WhenAsked) {
  std::mt19937 rng(4);
  OwnedWeight owned = random_weight(rng, WeightFormat::kBf16, 24, 64);
  const std::vector<float> x = random_floats(rng, 64, 1.0f, true);
  for (CpuIsa isa : vector_isas()) {
    const std::vector<float> plain = run_gemm(owned.weight, x, 1, isa, 1, false, true);
    const std::vector<float> rounded = run_gemm(owned.weight, x, 1, isa, 1, true, true);
    for (int r = 0; r < 24; ++r) EXPECT_EQ(rounded[r], round_bf16(plain[r]));
  }
}

TEST(Gemm, ZeroTokensAndZeroRowsWriteNothing) {
  std::mt19937 rng(5);
  OwnedWeight owned = random_weight(rng, WeightFormat::kNvfp4, 16, 64);
  ThreadPool pool(1);
  for (CpuIsa isa : vector_isas()) {
    gemm({nullptr, &owned.weight, nullptr, 0, 64, 16, true}, {pool, isa});
    Weight empty;
    empty.view.format = WeightFormat::kBf16;
    empty.view.cols = 64;
    gemm({nullptr, &empty, nullptr, 4, 64, 0, true}, {pool, isa});
  }
}

TEST(Gemm, InvalidArgumentsAreRefused) {
  std::mt19937 rng(6);
  OwnedWeight owned = random_weight(rng, WeightFormat::kNvfp4, 16, 64);
  ThreadPool pool(1);
  const CpuContext context{pool, best_cpu_isa()};
  std::vector<float> x(64), y(16);
  EXPECT_THROW(gemm({x.data(), nullptr, y.data(), 1, 64, 16, false}, context), Error);
  EXPECT_THROW(gemm({x.data(), &owned.weight, y.data(), -1, 64, 16, false}, context), Error);
  EXPECT_THROW(gemm({x.data(), &owned.weight, y.data(), 1, 63, 16, false}, context), Error);
  EXPECT_THROW(gemm({x.data(), &owned.weight, y.data(), 1, 64, 15, false}, context), Error);
  EXPECT_THROW(gemm({nullptr, &owned.weight, y.data(), 1, 64, 16, false}, context), Error);
  Weight bad = owned.weight;
  bad.view.sf = nullptr;
  EXPECT_THROW(gemm({x.data(), &bad, y.data(), 1, 64, 16, false}, context), Error);
  bad = owned.weight;
  bad.view.cols = 56;
  EXPECT_THROW(gemm({x.data(), &bad, y.data(), 1, 64, 16, false}, context), Error);
}

TEST(GemmPack, PackedPanelsHoldTheStoredCodesAndZeroPadding) {
  std::mt19937 rng(7);
  OwnedWeight owned = random_weight(rng, WeightFormat::kNvfp4, 19, 80);
  std::vector<std::byte> panel(2 * 576);
  for (int64_t row_begin : {0, 16}) {
    pack_panel(owned.weight.view, row_begin, panel.data());
    for (int64_t r = 0; r < 16; ++r) {
      for (int64_t k = 0; k < 128; ++k) {
        const std::byte* record = panel.data() + k / 64 * 576;
        const auto byte = static_cast<uint8_t>(record[(k % 64) / 8 * 64 + r * 4 + (k % 8) / 2]);
        const auto sf = static_cast<uint8_t>(record[512 + (k % 64) / 16 * 16 + r]);
        const bool inside = row_begin + r < 19 && k < 80;
        const int64_t at = (row_begin + r) * 80 + k;
        EXPECT_EQ((byte >> (k % 2 * 4)) & 15, inside ? (owned.data[at / 2] >> (k % 2 * 4)) & 15 : 0);
        EXPECT_EQ(sf, inside ? owned.sf[at / 16] : 0);
      }
    }
  }
}

TEST(GemmPack, ProgressReachesTheTotalAndOnlyNvfp4IsPacked) {
  std::mt19937 rng(8);
  OwnedWeight a = random_weight(rng, WeightFormat::kNvfp4, 64, 256),
              b = random_weight(rng, WeightFormat::kBf16, 64, 256);
  ThreadPool pool(2);
  Weight* list[] = {&a.weight, &b.weight};
  int64_t last = 0, total = 0;
  pack_weights(list, {pool, CpuIsa::kAvx2}, [&](int64_t done, int64_t all) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
  });
  EXPECT_EQ(last, total);
  EXPECT_EQ(total, packed_bytes(a.weight.view));
  EXPECT_NE(a.weight.packed, nullptr);
  EXPECT_EQ(b.weight.packed, nullptr);
}

TEST(GemmCost, CountsStoredBytesAndTwoFlopsPerProduct) {
  std::mt19937 rng(9);
  OwnedWeight w = random_weight(rng, WeightFormat::kNvfp4, 32, 64);
  const OpCost cost = gemm_cost(w.weight.view, 3);
  EXPECT_EQ(cost.flops, 2.0 * 3 * 32 * 64);
  EXPECT_EQ(cost.bytes, 32 * 32 + 32 * 4 + 4 + 3 * 4 * (32 + 64));
}

}  // namespace
}  // namespace dsv4::test
