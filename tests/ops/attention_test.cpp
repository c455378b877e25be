// Attention over window and compressed rows; cache row formats.
#include "ops/attention/attention.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/check.h"
#include "cache/sequence_cache.h"
#include "codec/nvfp4.h"
#include "ops/random.h"

namespace dsv4 {
namespace {

struct Case {
  KvFormat format;
  int num_heads, head_dim, rope_dim, window_len, ratio;
  int64_t first_position, num_tokens;
  int max_selected;  // 0: all visible
};

// Fills a cache with random rows for positions [0, first + tokens) and runs attention over the chunk.
class AttentionRun {
 public:
  explicit AttentionRun(const Case& c)
      : case_(c), q_(random_floats(c.num_tokens * c.num_heads * c.head_dim, 1)), sink_(random_floats(c.num_heads, 2)) {
    CacheShape shape;
    shape.row = {c.format, c.head_dim, c.rope_dim};
    shape.index_key = {IndexFormat::kF32, 16};
    shape.window_len = c.window_len;
    shape.max_chunk = c.num_tokens;
    shape.layers.resize(1);
    cache_ = std::make_unique<SequenceCache>(shape);
    const int64_t end = c.first_position + c.num_tokens;
    const auto rows = random_floats(end * c.head_dim, 3);
    for (int64_t p = 0; p < end; ++p) encode_kv_row(shape.row, &rows[p * c.head_dim], layer().window_row(p));
    if (c.ratio == 0) return;
    const auto compressed = random_floats(end / c.ratio * c.head_dim, 4);
    for (int64_t j = 0; j < end / c.ratio; ++j)
      encode_kv_row(shape.row, &compressed[j * c.head_dim], layer().compressed.append());
    for (int64_t t = 0; c.max_selected > 0 && t < c.num_tokens; ++t) {
      const int64_t visible = (c.first_position + t + 1) / c.ratio;
      for (int i = 0; i < c.max_selected; ++i)
        selected_.push_back(2 * i + t % 2 < visible ? static_cast<int32_t>(2 * i + t % 2) : -1);
    }
  }

  LayerCache& layer() { return cache_->layer(0); }

  std::vector<float> run(CpuIsa isa, int num_threads, std::vector<float>* lse = nullptr) {
    ThreadPool pool(num_threads);
    std::vector<float> out(q_.size(), NAN);
    if (lse) lse->assign(static_cast<size_t>(case_.num_tokens * case_.num_heads), NAN);
    attention({.q = q_.data(),
               .out = out.data(),
               .lse = lse ? lse->data() : nullptr,
               .sink_logit = sink_.data(),
               .window = layer().window(),
               .compressed = layer().compressed.view(),
               .layout = cache_->shape().row,
               .selected = case_.max_selected > 0 ? selected_.data() : nullptr,
               .max_selected = case_.max_selected,
               .first_position = case_.first_position,
               .num_tokens = case_.num_tokens,
               .num_heads = case_.num_heads,
               .window_len = case_.window_len,
               .compress_ratio = case_.ratio,
               .scale = 1.0f / std::sqrt(static_cast<float>(case_.head_dim))},
              {pool, isa});
    return out;
  }

  std::vector<float>& sink() { return sink_; }

 private:
  Case case_;
  std::vector<float> q_, sink_;
  std::vector<int32_t> selected_;
  std::unique_ptr<SequenceCache> cache_;
};

const Case kCases[] = {
    {KvFormat::kF32, 4, 512, 64, 128, 0, 0, 1, 0},       {KvFormat::kF32, 4, 512, 64, 128, 4, 700, 5, 64},
    {KvFormat::kBf16, 5, 96, 32, 7, 128, 300, 9, 0},     {KvFormat::kBf16, 64, 512, 64, 128, 4, 2600, 1, 512},
    {KvFormat::kFp8, 3, 512, 64, 128, 128, 1000, 3, 0},  {KvFormat::kFp8, 2, 144, 64, 16, 4, 50, 20, 4},
    {KvFormat::kNvfp4, 8, 512, 64, 128, 4, 130, 40, 64}, {KvFormat::kNvfp4, 1, 80, 16, 1, 3, 0, 33, 0},
};

TEST(Attention, FastPathsMatchThePlainReference) {
  for (const Case& c : kCases) {
    AttentionRun run(c);
    std::vector<float> lse, expected_lse;
    const auto expected = run.run(CpuIsa::kReference, 2, &expected_lse);
    for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512}) {
      if (isa > best_cpu_isa()) continue;
      // Sums of at most 640 rows in binary32 with 8 lanes: relative error below 640 / 8 * 2^-24 * small constant.
      EXPECT_LT(relative_error(run.run(isa, 2, &lse), expected), 2e-5) << c.head_dim << " " << c.ratio;
      EXPECT_LT(relative_error(lse, expected_lse), 1e-6);
    }
  }
}

TEST(Attention, ResultIsIndependentOfThreads) {
  for (const Case& c : kCases) {
    AttentionRun run(c);
    EXPECT_EQ(run.run(best_cpu_isa(), 1), run.run(best_cpu_isa(), 3));
  }
}

TEST(Attention, InfiniteSinkZeroesTheOutputAndMinusInfinityRemovesIt) {
  const Case c{KvFormat::kF32, 2, 64, 16, 8, 0, 20, 1, 0};
  for (CpuIsa isa : {CpuIsa::kReference, best_cpu_isa()}) {
    AttentionRun run(c);
    run.sink() = {INFINITY, -INFINITY};
    const auto out = run.run(isa, 1);
    double norm = 0;
    for (int i = 0; i < 64; ++i) {
      EXPECT_EQ(out[i], 0.0f);
      norm += std::fabs(out[64 + i]);
    }
    EXPECT_GT(norm, 0.1);
  }
}

TEST(Attention, WindowIsExactlyWindowLenRowsIncludingTheTokenItself) {
  // With one position of the window changed, the output changes; one position before the window, it does not.
  const Case c{KvFormat::kF32, 1, 32, 16, 8, 0, 30, 1, 0};
  const auto with_changed = [&](int64_t position) {
    AttentionRun run(c);
    const auto other = random_floats(32, 99);
    encode_kv_row({KvFormat::kF32, 32, 16}, other.data(), run.layer().window_row(position));
    return run.run(CpuIsa::kReference, 1);
  };
  AttentionRun run(c);
  const auto base = run.run(CpuIsa::kReference, 1);
  EXPECT_NE(with_changed(30), base);
  EXPECT_NE(with_changed(23), base);
}

TEST(KvRow, BytesPerRowAreThoseOfTheSpecification) {
  EXPECT_EQ((KvRowLayout{KvFormat::kF32, 512, 64}.row_bytes()), 2048);
  EXPECT_EQ((KvRowLayout{KvFormat::kBf16, 512, 64}.row_bytes()), 1024);
  EXPECT_EQ((KvRowLayout{KvFormat::kFp8, 512, 64}.row_bytes()), 584);
  EXPECT_EQ((KvRowLayout{KvFormat::kNvfp4, 512, 64}.row_bytes()), 384);
  EXPECT_EQ((IndexKeyLayout{IndexFormat::kFp8, 128}.row_bytes()), 132);
  EXPECT_EQ((IndexKeyLayout{IndexFormat::kFp4, 128}.row_bytes()), 68);
}

TEST(KvRow, Nvfp4RowHasTheGoldenBytesOfTheSpecification) {
  // spec 6.5: these channels with scale 1 give 80 91 A2 B3 C4 D5 E6 F7 and scale byte 38.
  const float channels[16] = {0, -0.0f, .5, -.5, 1, -1, 1.5, -1.5, 2, -2, 3, -3, 4, -4, 6, -6};
  std::vector<float> x(512, 0.0f);
  std::copy_n(channels, 16, x.begin());
  std::vector<uint8_t> row(384, 0xee);
  encode_kv_row({KvFormat::kNvfp4, 512, 64}, x.data(), row.data());
  const uint8_t expected[8] = {0x80, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7};
  EXPECT_EQ(std::memcmp(row.data(), expected, 8), 0);
  EXPECT_EQ(row[224 + 128], 0x38);
  for (int i = 28; i < 32; ++i) EXPECT_EQ(row[224 + 128 + i], 0);  // padding is zero
}

TEST(KvRow, StoredRowsAreFixedPointsOfTheirFormat) {
  for (KvFormat format : {KvFormat::kF32, KvFormat::kBf16, KvFormat::kFp8}) {
    const KvRowLayout layout{format, 512, 64};
    const auto x = random_floats(512, 7, 3.0f);
    std::vector<uint8_t> once(layout.row_bytes()), twice(layout.row_bytes());
    std::vector<float> y(512);
    encode_kv_row(layout, x.data(), once.data());
    decode_kv_row(layout, once.data(), y.data(), best_cpu_isa());
    encode_kv_row(layout, y.data(), twice.data());
    EXPECT_EQ(once, twice) << static_cast<int>(format);
  }
}

TEST(Attention, MissingCompressedRowsAreRefused) {
  AttentionRun run({KvFormat::kF32, 1, 32, 16, 8, 4, 40, 1, 0});
  run.layer().compressed.truncate(3);
  EXPECT_THROW(run.run(CpuIsa::kReference, 1), Error);
}

}  // namespace
}  // namespace dsv4
