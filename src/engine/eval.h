// Measuring a model on given tokens: perplexity over cold windows, and logits (with residual streams) for comparison.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace dsv4 {

struct PerplexityResult {
  int64_t num_windows = 0;
  int64_t num_scored = 0;  // tokens
  int64_t num_bytes = 0;   // of the scored tokens' text
  double nats = 0;         // sum of -log p
  double seconds = 0;

  double perplexity() const;
  double nats_per_byte() const { return nats / static_cast<double>(num_bytes); }
};

// Window i starts cold, feeds tokens[i*ctx, i*ctx + ctx) and scores tokens[i*ctx + 1, i*ctx + ctx]; an incomplete last window
// is left out; max_windows 0 = all. progress(done, total) returns false to stop: the result is then of what was scored until there.
// Throws bad input for ctx < 1 and for tokens without one complete window.
PerplexityResult evaluate_perplexity(Engine& engine, std::span<const TokenId> tokens, int64_t ctx, int64_t max_windows,
                                     const std::function<bool(int64_t, int64_t)>& progress = {});

struct LogitsResult {
  int64_t num_tokens = 0;
  std::vector<float> logits;           // [num_tokens, vocab]
  std::vector<float> layer_streams;    // [layers, num_tokens, num_hc, hidden], if asked for
  std::vector<float> decision_margin;  // [num_tokens] see StepObserver
};

LogitsResult evaluate_logits(Engine& engine, std::span<const TokenId> tokens, bool with_layers,
                             const std::function<bool(int64_t, int64_t)>& progress = {});

}  // namespace dsv4
