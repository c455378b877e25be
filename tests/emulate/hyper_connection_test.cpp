// The source of hyper_connection_boundary, run on the CPU, against hc_post, hc_pre, hc_head and quantize_rows.
#include "ops/hyper_connection/hyper_connection_cuda.cu"  // NOLINT: the kernel itself

#include <gtest/gtest.h>

#include <random>

#include "ops/hyper_connection/hyper_connection.h"
#include "ops/norm/norm.h"

namespace dsv4::test {
namespace {

constexpr float kEps = 1e-6f;

std::vector<float> normal_values(int64_t count, uint32_t seed, float size) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = normal(random) * size;
  return x;
}
std::vector<float> widen(const bf16* x, int64_t count) {
  std::vector<float> y(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) y[static_cast<size_t>(i)] = decode_bf16(x[i]);
  return y;
}

// 64-byte aligned, as device memory is.
template <class T>
struct Array {
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  int64_t count;
  std::unique_ptr<T, Free> memory;

  explicit Array(int64_t n)
      : count(n), memory(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64))) {
    std::memset(static_cast<void*>(memory.get()), 0xa5, static_cast<size_t>(n) * sizeof(T));
  }
  explicit Array(const std::vector<float>& values) : Array(static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) {
      if constexpr (std::is_same_v<T, float>)
        memory.get()[i] = values[i];
      else
        memory.get()[i] = encode_bf16(values[i]);
    }
  }
  T* data() const { return memory.get(); }
};

struct Site {
  int64_t tokens, hidden;
  Array<bf16> streams, sublayer, weight, streams_out, y;
  Array<float> post, comb, fn, scale, base, post_out, comb_out, row_global;
  Array<uint8_t> codes, sf;

  Site(int64_t t, int64_t d, int mix)
      : tokens(t),
        hidden(d),
        streams(normal_values(t * 4 * d, 1, 3)),
        sublayer(normal_values(t * d, 2, 1)),
        weight(normal_values(d, 3, 1)),
        streams_out(t * 4 * d),
        y(t * d),
        post(normal_values(t * 4, 4, 0.5f)),
        comb(normal_values(t * 16, 5, 0.3f)),
        fn(normal_values(mix * 4 * d, 6, 1.0f / std::sqrt(static_cast<float>(4 * d)))),
        scale({0.7f, 1.3f, 0.9f, 0}),
        base(normal_values(24, 7, 0.5f)),
        post_out(t * 4),
        comb_out(t * 16),
        row_global(t),
        codes(t * d),
        sf((t + 127) / 128 * 128 * d / 16) {}
  HcBoundaryArgs args(bool head) const {
    return {streams.data(),
            sublayer.data(),
            post.data(),
            comb.data(),
            streams_out.data(),
            fn.data(),
            scale.data(),
            base.data(),
            post_out.data(),
            comb_out.data(),
            head,
            weight.data(),
            QuantizedRows{.format = RowFormat::kBf16, .y = y.data()},
            tokens,
            hidden,
            20,
            kEps,
            kEps};
  }
  HcShape shape() const { return {tokens, hidden, 4, 20, kEps, kEps, true}; }
  HcParams params() const { return {fn.data(), scale.data(), base.data()}; }
};

void expect_close(const char* what, const std::vector<float>& got, const std::vector<float>& want, double relative_l2,
                  double share) {
  double error = 0, norm = 0;
  int64_t different = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (static_cast<double>(got[i]) - want[i]) * (static_cast<double>(got[i]) - want[i]);
    norm += static_cast<double>(want[i]) * want[i];
    different += got[i] != want[i];
  }
  EXPECT_LT(std::sqrt(error / norm), relative_l2) << what;
  EXPECT_LT(static_cast<double>(different), share * static_cast<double>(got.size())) << what;
}

// One tile, a partial one, many tiles a cluster (also more than it has CTAs), one and two teams of warps, both widths.
const std::pair<int64_t, int64_t> kShapes[] = {{3, 512}, {37, 1024}, {400, 512}, {8, 4096}, {11, 7168}};

TEST(EmulatedHyperConnection, BoundaryEqualsPostThenPreThenNorm) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const auto& [tokens, hidden] : kShapes) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
    const Site s(tokens, hidden, 24);
    hyper_connection_boundary(s.args(false), {});
    std::vector<float> streams = widen(s.streams.data(), tokens * 4 * hidden), y(static_cast<size_t>(tokens * hidden)),
                       post(static_cast<size_t>(tokens * 4)), comb(static_cast<size_t>(tokens * 16));
    hc_post(s.shape(), widen(s.sublayer.data(), tokens * hidden).data(), s.post.data(), s.comb.data(), streams.data(),
            cpu);
    const std::vector<float> got_streams = widen(s.streams_out.data(), tokens * 4 * hidden);
    expect_close("streams", got_streams, streams, 1e-4, 0.002);
    hc_pre(s.shape(), s.params(), got_streams.data(), y.data(), post.data(), comb.data(), cpu);
    for (size_t i = 0; i < post.size(); ++i) ASSERT_NEAR(s.post_out.data()[i], post[i], 1e-5) << "post " << i;
    for (size_t i = 0; i < comb.size(); ++i) ASSERT_NEAR(s.comb_out.data()[i], comb[i], 1e-5) << "comb " << i;
    rms_norm({y.data(), widen(s.weight.data(), hidden).data(), y.data(), tokens, hidden, hidden, hidden, kEps, true},
             cpu);
    expect_close("rows", widen(s.y.data(), tokens * hidden), y, 5e-4, 0.02);
  }
}

TEST(EmulatedHyperConnection, HeadCollapseEqualsReference) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const auto& [tokens, hidden] : {std::pair<int64_t, int64_t>{11, 512}, {70, 1024}}) {
    const Site s(tokens, hidden, 4);
    HcBoundaryArgs args = s.args(true);
    args.norm_weight = nullptr;
    hyper_connection_boundary(args, {});
    std::vector<float> y(static_cast<size_t>(tokens * hidden));
    hc_head(s.shape(), s.params(), widen(s.streams_out.data(), tokens * 4 * hidden).data(), y.data(), cpu);
    expect_close("rows", widen(s.y.data(), tokens * hidden), y, 2e-4, 0.01);
  }
}

TEST(EmulatedHyperConnection, NormAndQuantiserInsideGiveTheBytesOfQuantizeRows) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const auto& [tokens, hidden] : {std::pair<int64_t, int64_t>{3, 512}, {130, 512}, {5, 7168}})
    for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kFp8})
      for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4}) {
        if (format != RowFormat::kNvfp4 && layout != SfLayout::kLinear) continue;
        SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden) + ", format " +
                     std::to_string(static_cast<int>(format)));
        const auto out_of = [&](const Site& s) {
          return QuantizedRows{.format = format,
                               .global_mode = format == RowFormat::kNvfp4 ? GlobalMode::kComputeRow : GlobalMode::kOne,
                               .sf_layout = layout,
                               .codes = s.codes.data(),
                               .sf = s.sf.data(),
                               .y = s.y.data(),
                               .row_global = s.row_global.data()};
        };
        const Site fused(tokens, hidden, 24), unfused(tokens, hidden, 24);
        HcBoundaryArgs args = fused.args(false);
        args.out = out_of(fused);
        hyper_connection_boundary(args, {});
        const Array<bf16> collapsed(tokens * hidden);
        args = unfused.args(false);
        args.norm_weight = nullptr;
        args.out = QuantizedRows{.format = RowFormat::kBf16, .y = collapsed.data()};
        hyper_connection_boundary(args, {});
        quantize_rows(
            QuantizeArgs{collapsed.data(), false, unfused.weight.data(), kEps, tokens, hidden, hidden, out_of(unfused)},
            cpu);
        EXPECT_EQ(std::memcmp(fused.y.data(), unfused.y.data(), static_cast<size_t>(tokens * hidden) * 2), 0);
        EXPECT_EQ(std::memcmp(fused.codes.data(), unfused.codes.data(), static_cast<size_t>(fused.codes.count)), 0);
        EXPECT_EQ(std::memcmp(fused.sf.data(), unfused.sf.data(), static_cast<size_t>(fused.sf.count)), 0);
        if (format != RowFormat::kNvfp4) continue;
        EXPECT_EQ(std::memcmp(fused.row_global.data(), unfused.row_global.data(), static_cast<size_t>(tokens) * 4), 0);
      }
}

}  // namespace
}  // namespace dsv4::test
