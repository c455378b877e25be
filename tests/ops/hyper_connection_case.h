// Shared by the tests of hyper_connection_boundary on a GPU (tests/gpu) and of its source run on the CPU (tests/emulate): a site, its arrays
// in the memory of either, and the comparison with the CPU ops. Array<T> is built from a count or a std::vector<T>; it has data() and host().
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "codec/bf16.h"
#include "ops/hyper_connection/hyper_connection.h"
#include "ops/hyper_connection/hyper_connection_gpu.h"
#include "ops/norm/norm.h"
#include "ops/random.h"

namespace dsv4::test {

constexpr float kHcEps = 1e-6f;

inline std::vector<float> widen(const std::vector<bf16>& x) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = decode_bf16(x[i]);
  return y;
}
inline std::vector<bf16> random_bf16(int64_t count, uint32_t seed, float scale) {
  std::vector<bf16> y;
  for (const float x : random_floats(count, seed, scale)) y.push_back(encode_bf16(x));
  return y;
}

struct HcInputs {
  int64_t tokens, hidden;
  std::vector<bf16> streams, sublayer, weight;
  std::vector<float> post, comb, fn, scale, base;

  HcInputs(int64_t t, int64_t d, int mix)
      : tokens(t),
        hidden(d),
        streams(random_bf16(t * 4 * d, 1, 3)),
        sublayer(random_bf16(t * d, 2, 1)),
        weight(random_bf16(d, 3, 1)),
        post(random_floats(t * 4, 4, 0.5f)),
        comb(random_floats(t * 16, 5, 0.3f)),
        fn(random_floats(mix * 4 * d, 6, 1.0f / std::sqrt(static_cast<float>(4 * d)))),
        scale{0.7f, 1.3f, 0.9f},
        base(random_floats(24, 7, 0.5f)) {}
  HcShape shape() const { return {tokens, hidden, 4, 20, kHcEps, kHcEps, true}; }
  HcParams params() const { return {fn.data(), scale.data(), base.data()}; }
};

// where: what an Array's constructor takes in front (a GPU test: the machine).
template <template <class> class Array>
struct HcSite {
  Array<bf16> streams, sublayer, weight, streams_out, y;
  Array<float> post, comb, fn, scale, base, post_out, comb_out, row_global;
  Array<uint8_t> codes, sf;

  template <class... Where>
  explicit HcSite(const HcInputs& in, Where&... where)
      : streams(where..., in.streams),
        sublayer(where..., in.sublayer),
        weight(where..., in.weight),
        streams_out(where..., in.tokens * 4 * in.hidden),
        y(where..., in.tokens * in.hidden),
        post(where..., in.post),
        comb(where..., in.comb),
        fn(where..., in.fn),
        scale(where..., in.scale),
        base(where..., in.base),
        post_out(where..., in.tokens * 4),
        comb_out(where..., in.tokens * 16),
        row_global(where..., in.tokens),
        codes(where..., in.tokens * in.hidden),
        sf(where..., (in.tokens + 127) / 128 * 128 * in.hidden / 16) {}
  HcBoundaryArgs args(const HcInputs& in, bool head) const {
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
            kHcEps,
            kHcEps};
  }
  QuantizedRows quantized(RowFormat format, SfLayout layout) const {
    return {.format = format,
            .global_mode = format == RowFormat::kNvfp4 ? GlobalMode::kComputeRow : GlobalMode::kOne,
            .sf_layout = layout,
            .codes = codes.data(),
            .sf = sf.data(),
            .y = y.data(),
            .row_global = row_global.data()};
  }
};

// relative_l2: of the difference; share: of elements that differ at all.
inline void expect_close(const char* what, const std::vector<float>& got, const std::vector<float>& want,
                         double relative_l2, double share) {
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
inline void expect_near(const char* what, const std::vector<float>& got, const std::vector<float>& want, float bound) {
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], bound) << what << " " << i;
}

// post and comb of the next site (within bound), from the streams that a call left; returns hc_pre's collapsed rows.
template <template <class> class Array>
std::vector<float> expect_next_site(const HcInputs& in, const HcSite<Array>& site, const std::vector<bf16>& streams,
                                    float post_bound, float comb_bound, const CpuContext& cpu) {
  std::vector<float> y(static_cast<size_t>(in.tokens * in.hidden)), post(static_cast<size_t>(in.tokens * 4)),
      comb(static_cast<size_t>(in.tokens * 16));
  hc_pre(in.shape(), in.params(), widen(streams).data(), y.data(), post.data(), comb.data(), cpu);
  expect_near("post", site.post_out.host(), post, post_bound);
  expect_near("comb", site.comb_out.host(), comb, comb_bound);
  return y;
}

// Everything that a call with a sub-layer and bf16 rows left.
template <template <class> class Array>
void expect_post_then_pre_then_norm(const HcInputs& in, const HcSite<Array>& site, const CpuContext& cpu) {
  std::vector<float> streams = widen(in.streams);
  hc_post(in.shape(), widen(in.sublayer).data(), in.post.data(), in.comb.data(), streams.data(), cpu);
  const std::vector<bf16> got_streams = site.streams_out.host();
  // A bf16 rounding (2^-9) in at most 1 of 500 elements.
  expect_close("streams", widen(got_streams), streams, 1e-4, 0.002);
  std::vector<float> y = expect_next_site(in, site, got_streams, 1e-5f, 1e-5f, cpu);
  rms_norm({y.data(), widen(in.weight).data(), y.data(), in.tokens, in.hidden, in.hidden, in.hidden, kHcEps, true},
           cpu);
  expect_close("rows", widen(site.y.host()), y, 5e-4, 0.02);
}

// What a call for the head without norm left.
template <template <class> class Array>
void expect_head_collapse(const HcInputs& in, const HcSite<Array>& site, const CpuContext& cpu) {
  std::vector<float> y(static_cast<size_t>(in.tokens * in.hidden));
  hc_head(in.shape(), in.params(), widen(site.streams_out.host()).data(), y.data(), cpu);
  expect_close("rows", widen(site.y.host()), y, 2e-4, 0.01);
}

// A call that writes over its own input, against one that does not: every byte. run(args): the call.
template <template <class> class Array, class Run, class... Where>
void expect_same_bytes_in_place(const HcInputs& in, const Run& run, Where&... where) {
  const HcSite<Array> apart(in, where...), in_place(in, where...);
  run(apart.args(in, false));
  HcBoundaryArgs args = in_place.args(in, false);
  args.streams_out = in_place.streams.data(), args.post_out = in_place.post.data(),
  args.comb_out = in_place.comb.data();
  run(args);
  const auto expect_equal = [](const char* what, const auto& got, const auto& want) {
    const std::vector a = got.host(), b = want.host();
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]), 0) << what;
  };
  expect_equal("streams", in_place.streams, apart.streams_out);
  expect_equal("post", in_place.post, apart.post_out);
  expect_equal("comb", in_place.comb, apart.comb_out);
  expect_equal("rows", in_place.y, apart.y);
}

}  // namespace dsv4::test
