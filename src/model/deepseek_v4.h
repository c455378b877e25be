// DeepSeek-V4: the model as a function from (tokens, caches) to (logits, longer caches).
//
// forward() runs one step over any number of sequences: per layer
//   hc_pre -> attn_norm -> attention block -> hc_post -> hc_pre -> ffn_norm -> router + experts -> hc_post    (layer.cpp)
// then, for the tokens whose logits are wanted, head collapse -> norm -> head.
// Prefill, decode and chunks of any size are the same call; a token's result does not depend on how its prompt was cut.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/sequence_cache.h"
#include "checkpoint/checkpoint.h"
#include "model/weights.h"
#include "ops/cpu_context.h"
#include "ops/precision.h"

namespace dsv4 {

enum class WantLogits : uint8_t { kNone, kLast, kAll };

// Tokens that extend one sequence. A cache appears at most once per step.
struct SequenceInput {
  SequenceCache* cache;
  std::span<const int32_t> tokens;  // at most cache->shape().max_chunk
  WantLogits want = WantLogits::kLast;
};

// Optional look inside a step, for `eval logits` and tests.
struct StepObserver {
  // streams: [num_tokens, num_hc, hidden] after the layer, tokens of all sequences in order
  std::function<void(int layer, const float* streams, int64_t num_tokens)> on_layer;
  // Smallest distance, over layers, between the last chosen and the first refused expert or indexer row: [num_tokens]
  std::vector<float>* decision_margin = nullptr;
};

class DeepseekV4 {
 public:
  // Throws bad input naming the tensor; the checkpoint is kept alive by the model.
  DeepseekV4(std::shared_ptr<const Checkpoint> checkpoint, Precision precision, CpuContext context);
  ~DeepseekV4();

  const ModelConfig& config() const { return checkpoint_->config(); }
  const ModelWeights& weights() const { return weights_; }
  const Precision& precision() const { return precision_; }
  // Repacks the matrices for which it pays on this instruction set (ops/gemm/gemm_pack.h); returns the bytes it would take
  // or took. progress(done, total) as pack_weights.
  int64_t repacked_bytes() const;
  void repack(const std::function<void(int64_t, int64_t)>& progress = {});

  // Bytes of weights one decoded token reads (activated experts only).
  double bytes_per_token() const;

  SequenceCache new_sequence(int64_t max_chunk) const;

  // Throws bad input for a token id outside the vocabulary and for positions beyond max_position.
  void check_tokens(std::span<const int32_t> tokens, int64_t first_position) const;
  // logits: rows of vocab_size for the wanted tokens, in order of inputs; returns their number. check_tokens() of every input
  // comes before any cache changes.
  int64_t forward(std::span<const SequenceInput> inputs, std::vector<float>& logits, StepObserver* observer = nullptr);

 private:
  std::shared_ptr<const Checkpoint> checkpoint_;
  Precision precision_;
  CpuContext context_;
  ModelWeights weights_;
  struct Workspace;
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace dsv4
