// Compressor: streaming form against a direct one, chunking, first window, phases.
#include "ops/compressor/compressor.h"

#include <gtest/gtest.h>

#include <limits>

#include "ops/random.h"

namespace dsv4 {
namespace {

struct Inputs {
  CompressorShape shape;
  std::vector<float> value, gate, ape, norm;
  RopeFreqs rope;
};

Inputs make_inputs(CompressorShape shape, int64_t num_tokens) {
  return {shape,
          random_floats(num_tokens * shape.width(), 1),
          random_floats(num_tokens * shape.width(), 2),
          random_floats(shape.ratio * shape.width(), 3),
          random_floats(shape.dim, 4),
          make_rope_freqs(shape.rope_dim, 160000, nullptr)};
}

// Runs the tokens in chunks of the given size.
std::vector<float> run(const Inputs& in, int64_t num_tokens, int64_t chunk, CpuIsa isa) {
  ThreadPool pool(2);
  std::vector<float> state_value(in.shape.state_elems()), state_gate(in.shape.state_elems());
  reset_compressor_state(in.shape, state_value.data(), state_gate.data());
  std::vector<float> rows(num_tokens / in.shape.ratio * in.shape.dim, NAN);
  for (int64_t first = 0; first < num_tokens; first += chunk) {
    const int64_t count = std::min(chunk, num_tokens - first);
    compress({.shape = in.shape,
              .value = in.value.data() + first * in.shape.width(),
              .gate = in.gate.data() + first * in.shape.width(),
              .ape = in.ape.data(),
              .norm_weight = in.norm.data(),
              .rope = &in.rope,
              .state_value = state_value.data(),
              .state_gate = state_gate.data(),
              .rows = rows.data() + first / in.shape.ratio * in.shape.dim,
              .first_position = first,
              .num_tokens = count,
              .rms_eps = 1e-6f,
              .round_output = false},
             {pool, isa});
  }
  return rows;
}

// Straight from the definition: window w over its tokens, no state.
std::vector<float> direct(const Inputs& in, int64_t num_tokens) {
  const CompressorShape& s = in.shape;
  std::vector<float> rows;
  for (int64_t w = 0; w < num_tokens / s.ratio; ++w) {
    std::vector<float> row(s.dim);
    for (int c = 0; c < s.dim; ++c) {
      std::vector<double> gates, values;
      const auto add = [&](int64_t token, int channel) {
        gates.push_back(in.gate[token * s.width() + channel] + in.ape[token % s.ratio * s.width() + channel]);
        values.push_back(in.value[token * s.width() + channel]);
      };
      for (int64_t i = 0; s.overlap && w > 0 && i < s.ratio; ++i) add((w - 1) * s.ratio + i, c);
      for (int64_t i = 0; i < s.ratio; ++i) add(w * s.ratio + i, s.overlap ? s.dim + c : c);
      double sum = 0, weighted = 0;
      const double max = *std::max_element(gates.begin(), gates.end());
      for (size_t i = 0; i < gates.size(); ++i) {
        sum += std::exp(gates[i] - max);
        weighted += std::exp(gates[i] - max) * values[i];
      }
      row[c] = static_cast<float>(weighted / sum);
    }
    double squares = 0;
    for (float x : row) squares += static_cast<double>(x) * x;
    for (int c = 0; c < s.dim; ++c)
      row[c] = static_cast<float>(row[c] / std::sqrt(squares / s.dim + 1e-6) * in.norm[c]);
    std::vector<float> cos(s.rope_dim / 2), sin(s.rope_dim / 2);
    rope_angles(in.rope, w * s.ratio, cos.data(), sin.data());
    rope_rotate(row.data() + s.dim - s.rope_dim, cos.data(), sin.data(), s.rope_dim / 2, RopeDirection::kForward);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}

const CompressorShape kShapes[] = {{4, true, 64, 16}, {128, false, 32, 16}, {3, false, 48, 16}, {4, true, 512, 64}};

TEST(Compressor, StreamingMatchesTheDefinitionIncludingTheFirstWindow) {
  for (const CompressorShape& shape : kShapes) {
    const int64_t num_tokens = 3 * shape.ratio + 2;
    const Inputs in = make_inputs(shape, num_tokens);
    for (CpuIsa isa : {CpuIsa::kReference, best_cpu_isa()})
      EXPECT_LT(relative_error(run(in, num_tokens, num_tokens, isa), direct(in, num_tokens)), 2e-6) << shape.ratio;
  }
}

TEST(Compressor, AnyChunkingGivesTheSameBits) {
  for (const CompressorShape& shape : kShapes) {
    const int64_t num_tokens = 2 * shape.ratio + 5;
    const Inputs in = make_inputs(shape, num_tokens);
    const auto whole = run(in, num_tokens, num_tokens, best_cpu_isa());
    for (int64_t chunk : {1, 2, 3, 5, 7})
      EXPECT_EQ(run(in, num_tokens, chunk, best_cpu_isa()), whole) << shape.ratio << " " << chunk;
  }
}

TEST(Compressor, CountsTheWindowsAChunkCompletes) {
  EXPECT_EQ(num_completed_windows(0, 3, 4), 0);
  EXPECT_EQ(num_completed_windows(3, 1, 4), 1);
  EXPECT_EQ(num_completed_windows(2, 7, 4), 2);
  EXPECT_EQ(num_completed_windows(127, 129, 128), 2);
}

}  // namespace
}  // namespace dsv4
