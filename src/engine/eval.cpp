// Perplexity and logits.
#include "engine/eval.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/check.h"

namespace dsv4 {
namespace {

// -log softmax(logits)[target], in double: the sum over 4096 or 129280 terms must not lose digits.
double negative_log_likelihood(const float* logits, int64_t vocab, TokenId target) {
  const double max = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - max);
  return std::log(sum) + max - logits[target];
}

}  // namespace

double PerplexityResult::perplexity() const { return std::exp(nats / static_cast<double>(num_scored)); }

PerplexityResult evaluate_perplexity(Engine& engine, std::span<const TokenId> tokens, int64_t ctx, int64_t max_windows,
                                     const std::function<bool(int64_t, int64_t)>& progress) {
  if (ctx < 1) throw_bad_input("windows of {} tokens, expected at least 1", ctx);
  const int64_t complete = (static_cast<int64_t>(tokens.size()) - 1) / ctx;
  const int64_t num_windows = max_windows > 0 ? std::min(max_windows, complete) : complete;
  if (num_windows < 1)
    throw_bad_input("text of {} tokens (BOS included) has no complete window of {} and its next token", tokens.size(),
                    ctx);
  const int64_t vocab = engine.config().vocab_size, max_chunk = engine.options().max_chunk;
  const auto start = std::chrono::steady_clock::now();
  PerplexityResult result;
  SequenceCache cache = engine.model().new_sequence(max_chunk);
  std::vector<float> logits;
  for (int64_t window = 0; window < num_windows; ++window) {
    cache.clear();
    for (int64_t done = 0; done < ctx; done += max_chunk) {
      if (progress && !progress(window * ctx + done, num_windows * ctx)) return result;
      const int64_t first = window * ctx + done, count = std::min(max_chunk, ctx - done);
      const SequenceInput input{&cache, tokens.subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
                                WantLogits::kAll};
      engine.model().forward({&input, 1}, logits);
      for (int64_t t = 0; t < count; ++t) {
        const TokenId target = tokens[static_cast<size_t>(first + t + 1)];
        result.nats += negative_log_likelihood(logits.data() + t * vocab, vocab, target);
        result.num_bytes += static_cast<int64_t>(engine.tokenizer().token_bytes(target).size());
      }
      result.num_scored += count;
      result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    ++result.num_windows;
  }
  return result;
}

LogitsResult evaluate_logits(Engine& engine, std::span<const TokenId> tokens, bool with_layers,
                             const std::function<bool(int64_t, int64_t)>& progress) {
  const ModelConfig& config = engine.config();
  const int64_t total = static_cast<int64_t>(tokens.size()), max_chunk = engine.options().max_chunk;
  const int64_t stream_size = config.num_hc * config.hidden;
  LogitsResult result;
  if (with_layers) result.layer_streams.resize(static_cast<size_t>(config.num_layers * total * stream_size));
  SequenceCache cache = engine.model().new_sequence(max_chunk);
  std::vector<float> logits, margin;
  StepObserver observer;
  observer.decision_margin = &margin;
  if (with_layers)
    observer.on_layer = [&](int layer, const float* streams, int64_t count) {
      std::copy_n(streams, count * stream_size,
                  result.layer_streams.data() + (layer * total + result.num_tokens) * stream_size);
    };
  while (result.num_tokens < total) {
    if (progress && !progress(result.num_tokens, total)) return result;
    const int64_t count = std::min(max_chunk, total - result.num_tokens);
    const SequenceInput input{
        &cache, tokens.subspan(static_cast<size_t>(result.num_tokens), static_cast<size_t>(count)), WantLogits::kAll};
    engine.model().forward({&input, 1}, logits, &observer);
    result.logits.insert(result.logits.end(), logits.begin(), logits.end());
    result.decision_margin.insert(result.decision_margin.end(), margin.begin(), margin.end());
    result.num_tokens += count;
  }
  return result;
}

}  // namespace dsv4
