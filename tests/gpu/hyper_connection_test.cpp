// hyper_connection_boundary against hc_post, hc_pre and hc_head, and fused against unfused on the device.
#include "ops/hyper_connection/hyper_connection.h"

#include <algorithm>

#include "gpu/gpu_test.h"
#include "ops/hyper_connection/hyper_connection_gpu.h"
#include "ops/norm/norm.h"
#include "ops/quantize/quantize_gpu.h"

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
std::vector<float> widen(const std::vector<bf16>& x) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = decode_bf16(x[i]);
  return y;
}

// Largest difference, and the share of elements that differ at all.
struct Difference {
  double relative_l2, share;
};
Difference difference(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  int64_t different = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (static_cast<double>(got[i]) - want[i]) * (static_cast<double>(got[i]) - want[i]);
    norm += static_cast<double>(want[i]) * want[i];
    different += got[i] != want[i];
  }
  return {std::sqrt(error / norm), static_cast<double>(different) / static_cast<double>(got.size())};
}

struct Inputs {
  int64_t tokens, hidden;
  std::vector<bf16> streams, sublayer, weight;
  std::vector<float> post, comb, fn, scale, base;

  Inputs(int64_t t, int64_t d, int mix)
      : tokens(t),
        hidden(d),
        streams(to_bf16(normal_values(t * 4 * d, 1, 3))),
        sublayer(to_bf16(normal_values(t * d, 2, 1))),
        weight(to_bf16(normal_values(d, 3, 1))),
        post(normal_values(t * 4, 4, 0.5f)),
        comb(normal_values(t * 16, 5, 0.3f)),
        fn(normal_values(mix * 4 * d, 6, 1.0f / std::sqrt(static_cast<float>(4 * d)))),
        scale{0.7f, 1.3f, 0.9f},
        base(normal_values(24, 7, 0.5f)) {}
};

struct Device {
  DeviceArray<bf16> streams, sublayer, weight, streams_out, y;
  DeviceArray<float> post, comb, fn, scale, base, post_out, comb_out, row_global;
  DeviceArray<uint8_t> codes, sf;

  Device(Machine& m, const Inputs& in)
      : streams(m, in.streams),
        sublayer(m, in.sublayer),
        weight(m, in.weight),
        streams_out(m, in.tokens * 4 * in.hidden),
        y(m, in.tokens * in.hidden),
        post(m, in.post),
        comb(m, in.comb),
        fn(m, in.fn),
        scale(m, in.scale),
        base(m, in.base),
        post_out(m, in.tokens * 4),
        comb_out(m, in.tokens * 16),
        row_global(m, in.tokens),
        codes(m, in.tokens * in.hidden),
        sf(m, (in.tokens + 127) / 128 * 128 * in.hidden / 16) {}
  HcBoundaryArgs args(const Inputs& in, bool head) {
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
            in.tokens,
            in.hidden,
            20,
            kEps,
            kEps};
  }
};

const std::pair<int64_t, int64_t> kShapes[] = {{1, 512},   {3, 1024}, {1, 4096},  {8, 4096},
                                               {37, 4096}, {5, 7168}, {130, 512}, {19, 7168}};

TEST(GpuHyperConnection, BoundaryEqualsPostThenPreThenNorm) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [tokens, hidden] : kShapes) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
    const Inputs in(tokens, hidden, 24);
    Device d(machine, in);
    hyper_connection_boundary(d.args(in, false), machine.gpu);

    const HcShape shape{tokens, hidden, 4, 20, kEps, kEps, true};
    const HcParams params{in.fn.data(), in.scale.data(), in.base.data()};
    std::vector<float> streams = widen(in.streams), y(static_cast<size_t>(tokens * hidden)),
                       post(static_cast<size_t>(tokens * 4)), comb(static_cast<size_t>(tokens * 16));
    hc_post(shape, widen(in.sublayer).data(), in.post.data(), in.comb.data(), streams.data(), machine.cpu);
    const std::vector<float> got_streams = widen(d.streams_out.host());
    const Difference stream_difference = difference(got_streams, streams);
    EXPECT_LT(stream_difference.relative_l2, 1e-4);  // a bf16 rounding (2^-9) in at most 1 of 500 elements
    EXPECT_LT(stream_difference.share, 0.002);
    hc_pre(shape, params, got_streams.data(), y.data(), post.data(), comb.data(), machine.cpu);
    for (size_t i = 0; i < post.size(); ++i) ASSERT_NEAR(d.post_out.host()[i], post[i], 1e-5) << "post " << i;
    const std::vector<float> got_comb = d.comb_out.host();
    for (size_t i = 0; i < comb.size(); ++i) ASSERT_NEAR(got_comb[i], comb[i], 1e-5) << "comb " << i;
    rms_norm({y.data(), widen(in.weight).data(), y.data(), tokens, hidden, hidden, hidden, kEps, true}, machine.cpu);
    const Difference y_difference = difference(widen(d.y.host()), y);
    EXPECT_LT(y_difference.relative_l2, 5e-4);
    EXPECT_LT(y_difference.share, 0.02);
  }
}

TEST(GpuHyperConnection, HeadCollapseEqualsReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [tokens, hidden] : kShapes) {
    const Inputs in(tokens, hidden, 4);
    Device d(machine, in);
    HcBoundaryArgs args = d.args(in, true);
    args.norm_weight = nullptr;
    hyper_connection_boundary(args, machine.gpu);
    const HcShape shape{tokens, hidden, 4, 20, kEps, kEps, true};
    std::vector<float> y(static_cast<size_t>(tokens * hidden));
    hc_head(shape, {in.fn.data(), in.scale.data(), in.base.data()}, widen(d.streams_out.host()).data(), y.data(),
            machine.cpu);
    const Difference y_difference = difference(widen(d.y.host()), y);
    EXPECT_LT(y_difference.relative_l2, 2e-4);
    EXPECT_LT(y_difference.share, 0.01);
  }
}

// Logits far apart make Sinkhorn slow and its first column sums tiny. The scale multiplies the mix's error: 20 * 1e-6 in each logit.
TEST(GpuHyperConnection, CombOfLogitsFarApartEqualsReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const float scale : {20.0f, 80.0f}) {
    Inputs in(24, 1024, 24);
    in.scale[2] = scale;
    Device d(machine, in);
    hyper_connection_boundary(d.args(in, false), machine.gpu);
    const HcShape shape{24, 1024, 4, 20, kEps, kEps, true};
    std::vector<float> y(24 * 1024), post(24 * 4), comb(24 * 16);
    hc_pre(shape, {in.fn.data(), in.scale.data(), in.base.data()}, widen(d.streams_out.host()).data(), y.data(),
           post.data(), comb.data(), machine.cpu);
    const std::vector<float> got = d.comb_out.host();
    for (size_t i = 0; i < comb.size(); ++i)
      ASSERT_NEAR(got[i], comb[i], 5e-6f * scale) << "scale " << scale << ", comb " << i;
  }
}

// Everything a call writes, of a call with all tokens and of calls with few (other kernels, one tile a cluster).
void expect_bytes_of_short_calls(int64_t tokens, int64_t hidden) {
  SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
  Machine machine;
  const Inputs in(tokens, hidden, 24);
  Device whole(machine, in), parts(machine, in);
  const auto args_of = [&](Device& d) {
    HcBoundaryArgs args = d.args(in, false);
    args.out = {.format = RowFormat::kNvfp4,
                .global_mode = GlobalMode::kComputeRow,
                .codes = d.codes.data(),
                .sf = d.sf.data(),
                .y = d.y.data(),
                .row_global = d.row_global.data()};
    return args;
  };
  hyper_connection_boundary(args_of(whole), machine.gpu);
  constexpr int64_t kPart = 24;
  for (int64_t first = 0; first < tokens; first += kPart) {
    HcBoundaryArgs args = args_of(parts);
    args.num_tokens = std::min(kPart, tokens - first);
    args.streams += first * 4 * hidden, args.streams_out += first * 4 * hidden, args.sublayer_out += first * hidden;
    args.post += first * 4, args.post_out += first * 4, args.comb += first * 16, args.comb_out += first * 16;
    args.out.codes += first * hidden / 2, args.out.sf += first * hidden / 16, args.out.y += first * hidden,
        args.out.row_global += first;
    hyper_connection_boundary(args, machine.gpu);
  }
  expect_same_bytes(whole.streams_out.host(), parts.streams_out.host(), "streams");
  expect_same_bytes(whole.post_out.host(), parts.post_out.host(), "post");
  expect_same_bytes(whole.comb_out.host(), parts.comb_out.host(), "comb");
  expect_same_bytes(whole.y.host(), parts.y.host(), "rows");
  expect_same_bytes(whole.codes.host(), parts.codes.host(), "codes");
  expect_same_bytes(whole.sf.host(), parts.sf.host(), "scale factors");
  expect_same_bytes(whole.row_global.host(), parts.row_global.host(), "row globals");
}

TEST(GpuHyperConnection, TwoTeamsOfWarpsGiveTheBytesOfOne) {
  DSV4_NEEDS_GPU();
  expect_bytes_of_short_calls(130, 512);
  expect_bytes_of_short_calls(130, 4096);
}

// More tiles a cluster than it has CTAs: every exchange buffer and every owner of post and comb comes round again.
TEST(GpuHyperConnection, LongCallsGiveTheBytesOfShortOnes) {
  DSV4_NEEDS_GPU();
  expect_bytes_of_short_calls(8000, 512);
  expect_bytes_of_short_calls(2400, 4096);
  expect_bytes_of_short_calls(1000, 7168);
}

TEST(GpuHyperConnection, WidthsWithoutAClusterAreRefused) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const int64_t hidden : {256, 500, 4352, 16384}) {
    const Inputs in(1, 512, 24);
    Device d(machine, in);
    HcBoundaryArgs args = d.args(in, false);
    args.hidden = hidden;
    EXPECT_THROW(hyper_connection_boundary(args, machine.gpu), Error) << hidden;
  }
}

TEST(GpuHyperConnection, FirstSiteLeavesStreamsUntouched) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const Inputs in(6, 4096, 24);
  Device d(machine, in), same(machine, in);
  HcBoundaryArgs args = d.args(in, false);
  args.sublayer_out = nullptr, args.streams_out = nullptr;
  hyper_connection_boundary(args, machine.gpu);
  expect_same_bytes(d.streams.host(), in.streams, "streams");
  const HcShape shape{6, 4096, 4, 20, kEps, kEps, true};
  std::vector<float> y(6 * 4096), post(24), comb(96);
  hc_pre(shape, {in.fn.data(), in.scale.data(), in.base.data()}, widen(in.streams).data(), y.data(), post.data(),
         comb.data(), machine.cpu);
  for (size_t i = 0; i < post.size(); ++i) EXPECT_NEAR(d.post_out.host()[i], post[i], 1e-5);
}

TEST(GpuHyperConnection, NormAndQuantiserInsideGiveTheBytesOfQuantizeRows) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [tokens, hidden] : kShapes)
    for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kFp8, RowFormat::kBf16})
      for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4}) {
        if (format != RowFormat::kNvfp4 && layout != SfLayout::kLinear) continue;
        SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden) + ", format " +
                     std::to_string(static_cast<int>(format)));
        const Inputs in(tokens, hidden, 24);
        Device fused(machine, in), unfused(machine, in);
        const auto out_of = [&](Device& d) {
          return QuantizedRows{.format = format,
                               .global_mode = format == RowFormat::kNvfp4 ? GlobalMode::kComputeRow : GlobalMode::kOne,
                               .sf_layout = layout,
                               .codes = d.codes.data(),
                               .sf = d.sf.data(),
                               .y = d.y.data(),
                               .row_global = d.row_global.data()};
        };
        HcBoundaryArgs args = fused.args(in, false);
        args.out = out_of(fused);
        hyper_connection_boundary(args, machine.gpu);
        DeviceArray<bf16> collapsed(machine, tokens * hidden);
        args = unfused.args(in, false);
        args.norm_weight = nullptr;
        args.out = QuantizedRows{.format = RowFormat::kBf16, .y = collapsed.data()};
        hyper_connection_boundary(args, machine.gpu);
        quantize_rows(
            QuantizeArgs{collapsed.data(), false, unfused.weight.data(), kEps, tokens, hidden, hidden, out_of(unfused)},
            machine.gpu);
        expect_same_bytes(fused.y.host(), unfused.y.host(), "normalised rows");
        expect_same_bytes(fused.codes.host(), unfused.codes.host(), "codes");
        expect_same_bytes(fused.sf.host(), unfused.sf.host(), "scale factors");
        if (format == RowFormat::kNvfp4)
          expect_same_bytes(fused.row_global.host(), unfused.row_global.host(), "row globals");
      }
}

}  // namespace
}  // namespace dsv4::test
