// hyper_connection_boundary against hc_post, hc_pre and hc_head, and fused against unfused on the device.
#include <algorithm>

#include "gpu/gpu_test.h"
#include "ops/hyper_connection_case.h"
#include "ops/quantize/quantize_gpu.h"

namespace dsv4::test {
namespace {

using Device = HcSite<DeviceArray>;

const std::pair<int64_t, int64_t> kShapes[] = {{1, 512},   {3, 1024}, {1, 4096},  {8, 4096},
                                               {37, 4096}, {5, 7168}, {130, 512}, {19, 7168}};

TEST(GpuHyperConnection, BoundaryEqualsPostThenPreThenNorm) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [tokens, hidden] : kShapes) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
    const HcInputs in(tokens, hidden, 24);
    const Device d(in, machine);
    hyper_connection_boundary(d.args(in, false), machine.gpu);
    expect_post_then_pre_then_norm(in, d, machine.cpu);
  }
}

TEST(GpuHyperConnection, HeadCollapseEqualsReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [tokens, hidden] : kShapes) {
    const HcInputs in(tokens, hidden, 4);
    const Device d(in, machine);
    HcBoundaryArgs args = d.args(in, true);
    args.norm_weight = nullptr;
    hyper_connection_boundary(args, machine.gpu);
    expect_head_collapse(in, d, machine.cpu);
  }
}

// Logits far apart make Sinkhorn slow and its first column sums tiny. The scale multiplies the mix's error: 20 * 1e-6 in each logit.
TEST(GpuHyperConnection, CombOfLogitsFarApartEqualsReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const float scale : {20.0f, 80.0f}) {
    HcInputs in(24, 1024, 24);
    in.scale[2] = scale;
    const Device d(in, machine);
    hyper_connection_boundary(d.args(in, false), machine.gpu);
    SCOPED_TRACE("scale " + std::to_string(scale));
    expect_next_site(in, d, d.streams_out.host(), 1e-5f, 5e-6f * scale, machine.cpu);
  }
}

// Everything a call writes, of a call with all tokens and of calls with few (other kernels, one tile a cluster).
void expect_bytes_of_short_calls(int64_t tokens, int64_t hidden) {
  SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
  Machine machine;
  const HcInputs in(tokens, hidden, 24);
  const Device whole(in, machine), parts(in, machine);
  const auto args_of = [&](const Device& d) {
    HcBoundaryArgs args = d.args(in, false);
    args.out = d.quantized(RowFormat::kNvfp4, SfLayout::kLinear);
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

// Out of place, two clusters may share a tile; in place, one has it.
TEST(GpuHyperConnection, CallsInPlaceGiveTheBytesOfOthers) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [tokens, hidden] : kShapes) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
    expect_same_bytes_in_place<DeviceArray>(
        HcInputs(tokens, hidden, 24), [&](const HcBoundaryArgs& args) { hyper_connection_boundary(args, machine.gpu); },
        machine);
  }
}

TEST(GpuHyperConnection, WidthsWithoutAClusterAreRefused) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const int64_t hidden : {256, 500, 4352, 16384}) {
    const HcInputs in(1, 512, 24);
    const Device d(in, machine);
    HcBoundaryArgs args = d.args(in, false);
    args.hidden = hidden;
    EXPECT_THROW(hyper_connection_boundary(args, machine.gpu), Error) << hidden;
  }
}

TEST(GpuHyperConnection, FirstSiteLeavesStreamsUntouched) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const HcInputs in(6, 4096, 24);
  const Device d(in, machine);
  HcBoundaryArgs args = d.args(in, false);
  args.sublayer_out = nullptr, args.streams_out = nullptr;
  hyper_connection_boundary(args, machine.gpu);
  expect_same_bytes(d.streams.host(), in.streams, "streams");
  expect_next_site(in, d, in.streams, 1e-5f, 1e-5f, machine.cpu);
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
        const HcInputs in(tokens, hidden, 24);
        const Device fused(in, machine), unfused(in, machine);
        HcBoundaryArgs args = fused.args(in, false);
        args.out = fused.quantized(format, layout);
        hyper_connection_boundary(args, machine.gpu);
        const DeviceArray<bf16> collapsed(machine, tokens * hidden);
        args = unfused.args(in, false);
        args.norm_weight = nullptr;
        // Collapsed rows beside codes of no interest: the order of a sum may depend on the format.
        args.out = unfused.quantized(format, layout);
        args.out.y = collapsed.data();
        hyper_connection_boundary(args, machine.gpu);
        quantize_rows(QuantizeArgs{collapsed.data(), false, unfused.weight.data(), kHcEps, tokens, hidden, hidden,
                                   unfused.quantized(format, layout)},
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
