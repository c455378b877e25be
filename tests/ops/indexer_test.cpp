// Indexer scores, selection, Hadamard rotation.
#include "ops/indexer/indexer.h"

#include <gtest/gtest.h>

#include "cache/sequence_cache.h"
#include "ops/random.h"

namespace dsv4 {
namespace {

struct Selection {
  std::vector<int32_t> selected;
  std::vector<float> margin;
};

Selection run_indexer(const std::vector<float>& keys, int dim, const std::vector<float>& q,
                      const std::vector<float>& weight, int num_heads, int topk, int64_t first_position,
                      int64_t num_tokens, CpuIsa isa) {
  const IndexKeyLayout layout{IndexFormat::kF32, dim};
  PagedRows rows(layout.row_bytes());
  for (size_t j = 0; j < keys.size() / dim; ++j) encode_index_key(layout, &keys[j * dim], rows.append());
  ThreadPool pool(2);
  Selection run{std::vector<int32_t>(num_tokens * topk, 77), std::vector<float>(num_tokens)};
  indexer({.q = q.data(),
           .head_weight = weight.data(),
           .keys = rows.view(),
           .layout = layout,
           .selected = run.selected.data(),
           .margin = run.margin.data(),
           .first_position = first_position,
           .num_tokens = num_tokens,
           .num_heads = num_heads,
           .topk = topk,
           .compress_ratio = 4},
          {pool, isa});
  return run;
}

TEST(Indexer, SelectsTheBestVisibleRowsByReluScore) {
  constexpr int kDim = 16, kHeads = 3, kTopk = 5;
  constexpr int64_t kFirst = 400, kTokens = 3;
  const auto keys = random_floats(101 * kDim, 1), q = random_floats(kTokens * kHeads * kDim, 2),
             w = random_floats(kTokens * kHeads, 3);
  for (CpuIsa isa : {CpuIsa::kReference, best_cpu_isa()}) {
    const Selection run = run_indexer(keys, kDim, q, w, kHeads, kTopk, kFirst, kTokens, isa);
    for (int64_t t = 0; t < kTokens; ++t) {
      std::vector<std::pair<double, int32_t>> scored;
      for (int32_t j = 0; j < (kFirst + t + 1) / 4; ++j) {
        double score = 0;
        for (int h = 0; h < kHeads; ++h) {
          double dot = 0;
          for (int i = 0; i < kDim; ++i)
            dot += static_cast<double>(q[(t * kHeads + h) * kDim + i]) * keys[j * kDim + i];
          score += w[t * kHeads + h] * std::max(0.0, dot);
        }
        scored.push_back({-score, j});
      }
      std::sort(scored.begin(), scored.end());
      std::vector<int32_t> expected;
      for (int i = 0; i < kTopk; ++i) expected.push_back(scored[i].second);
      std::sort(expected.begin(), expected.end());
      EXPECT_EQ(std::vector<int32_t>(run.selected.begin() + t * kTopk, run.selected.begin() + (t + 1) * kTopk),
                expected);
      EXPECT_NEAR(run.margin[t], scored[kTopk].first - scored[kTopk - 1].first, 1e-4);
    }
  }
}

TEST(Indexer, TiesGoToTheLowerRow) {
  const std::vector<float> keys(20 * 16, 1.0f), q(16, 1.0f), w(1, 1.0f);
  const Selection run = run_indexer(keys, 16, q, w, 1, 4, 79, 1, best_cpu_isa());
  EXPECT_EQ(run.selected, (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(run.margin[0], 0.0f);
}

TEST(Indexer, EverythingVisibleIsSelectedWhileItFits) {
  const auto keys = random_floats(3 * 16, 1), q = random_floats(16, 2), w = random_floats(1, 3);
  EXPECT_EQ(run_indexer(keys, 16, q, w, 1, 4, 2, 1, best_cpu_isa()).selected, (std::vector<int32_t>{-1, -1, -1, -1}));
  EXPECT_EQ(run_indexer(keys, 16, q, w, 1, 4, 3, 1, best_cpu_isa()).selected, (std::vector<int32_t>{0, -1, -1, -1}));
  EXPECT_EQ(run_indexer(keys, 16, q, w, 1, 4, 11, 1, best_cpu_isa()).selected, (std::vector<int32_t>{0, 1, 2, -1}));
}

TEST(Hadamard, IsItsOwnInverseAndKeepsDotProducts) {
  auto x = random_floats(128, 1), y = random_floats(128, 2);
  const auto x0 = x;
  double before = 0, after = 0;
  for (int i = 0; i < 128; ++i) before += static_cast<double>(x[i]) * y[i];
  hadamard(x.data(), 128);
  hadamard(y.data(), 128);
  for (int i = 0; i < 128; ++i) after += static_cast<double>(x[i]) * y[i];
  EXPECT_NEAR(before, after, 1e-4);
  hadamard(x.data(), 128);
  EXPECT_LT(relative_error(x, x0), 1e-6);
}

TEST(Hadamard, IsInNaturalOrder) {
  std::vector<float> x(4, 0.0f);
  x[1] = 1.0f;
  hadamard(x.data(), 4);
  EXPECT_EQ(x, (std::vector<float>{.5f, -.5f, .5f, -.5f}));
}

TEST(IndexRoundTrip, QueryTakesTheSameStepsAsAStoredKey) {
  for (IndexFormat format : {IndexFormat::kF32, IndexFormat::kBf16, IndexFormat::kFp8, IndexFormat::kFp4}) {
    const IndexKeyLayout layout{format, 128};
    auto x = random_floats(128, 5);
    auto key = x;
    if (format == IndexFormat::kFp8 || format == IndexFormat::kFp4) hadamard(key.data(), 128);
    std::vector<uint8_t> row(layout.row_bytes());
    std::vector<float> decoded(128);
    encode_index_key(layout, key.data(), row.data());
    decode_index_key(layout, row.data(), decoded.data(), best_cpu_isa());
    index_round_trip(layout, x.data(), best_cpu_isa());
    EXPECT_EQ(x, decoded);
  }
}

}  // namespace
}  // namespace dsv4
