// hyper_connection (pre and post of one site) and compressor (CSA and HCA, from projections to finished rows).
#include <fmt/format.h>

#include "bench/bench.h"
#include "ops/compressor/compressor.h"
#include "ops/hyper_connection/hyper_connection.h"

namespace dsv4::bench {

void bench_hyper_connection(Bench& bench) {
  const int64_t hidden = model_shape(bench.options().shape).hidden;
  constexpr int kStreams = 4, kMix = (2 + kStreams) * kStreams;
  const std::string name = fmt::format("pre + post, {} streams of {}", kStreams, hidden);
  if (!bench.wants(name)) return;
  const auto fn = random_bf16_values(kMix * kStreams * hidden, 1), base = random_bf16_values(kMix, 2),
             scale = random_bf16_values(3, 3);
  for (int64_t num_tokens : bench.options().rows) {
    auto streams = random_bf16_values(num_tokens * kStreams * hidden, 4);
    std::vector<float> y(static_cast<size_t>(num_tokens * hidden)), post(static_cast<size_t>(num_tokens * kStreams)),
        comb(static_cast<size_t>(num_tokens * kStreams * kStreams));
    const HcShape shape{num_tokens, hidden, kStreams, 20, 1e-6f, 1e-6f, true};
    const HcParams params{fn.data(), scale.data(), base.data()};
    const double width = static_cast<double>(kStreams * hidden), tokens = static_cast<double>(num_tokens);
    const OpCost cost{4.0 * (kMix * width + tokens * (3 * width + 2.0 * static_cast<double>(hidden))),
                      tokens * width * 2.0 * (kMix + 2 + kStreams + 1)};
    bench.measure("hyper_connection", name, num_tokens, cost, bench.ceilings().f32_flops, [&](int64_t) {
      hc_pre(shape, params, streams.data(), y.data(), post.data(), comb.data(), bench.context());
      hc_post(shape, y.data(), post.data(), comb.data(), streams.data(), bench.context());
    });
  }
}

void bench_compressor(Bench& bench) {
  for (const CompressorShape& shape : {CompressorShape{4, true, 512, 64}, CompressorShape{128, false, 512, 64}}) {
    const std::string name = fmt::format("ratio {}, 512 channels", shape.ratio);
    if (!bench.wants(name)) continue;
    const RopeFreqs rope = make_rope_freqs(shape.rope_dim, 160000, nullptr);
    const auto ape = random_bf16_values(shape.ratio * shape.width(), 1), norm = random_bf16_values(shape.dim, 2);
    std::vector<float> state_value(static_cast<size_t>(shape.state_elems())), state_gate(state_value.size());
    reset_compressor_state(shape, state_value.data(), state_gate.data());
    for (int64_t num_tokens : bench.options().rows) {
      const auto value = random_bf16_values(num_tokens * shape.width(), 3),
                 gate = random_bf16_values(num_tokens * shape.width(), 4);
      std::vector<float> rows(static_cast<size_t>((num_tokens / shape.ratio + 1) * shape.dim));
      int64_t position = 0;  // successive calls go on, so that windows complete as often as in use
      const double tokens = static_cast<double>(num_tokens);
      const OpCost cost{8.0 * tokens * shape.width() * 2, tokens * shape.width() * 12.0};
      bench.measure("compressor", name, num_tokens, cost, bench.ceilings().f32_flops, [&](int64_t) {
        compress({.shape = shape,
                  .value = value.data(),
                  .gate = gate.data(),
                  .ape = ape.data(),
                  .norm_weight = norm.data(),
                  .rope = &rope,
                  .state_value = state_value.data(),
                  .state_gate = state_gate.data(),
                  .rows = rows.data(),
                  .first_position = position,
                  .num_tokens = num_tokens,
                  .rms_eps = 1e-6f,
                  .round_output = true},
                 bench.context());
        position += num_tokens;
      });
    }
  }
}

}  // namespace dsv4::bench
