// One transformer layer over one step, in the order of spec 2.4 and 10. layer.cpp reads top to bottom.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/sequence_cache.h"
#include "checkpoint/config.h"
#include "model/weights.h"
#include "ops/cpu_context.h"
#include "ops/precision.h"

namespace dsv4 {

// The tokens of one sequence inside a step.
struct SequenceSlice {
  SequenceCache* cache;
  int64_t first_token;  // row in the step's arrays
  int64_t num_tokens;
  int64_t first_position;
};

// cos and sin per token of a step: [num_tokens, rope_dim / 2]
struct RopeAngles {
  std::vector<float> cos, sin;
};

// What all layers of a step share.
struct StepContext {
  const ModelConfig& config;
  const ModelWeights& weights;
  const Precision& precision;
  const CpuContext& cpu;
  std::vector<SequenceSlice> slices;
  std::vector<int32_t> token_ids;    // [num_tokens]
  RopeAngles window_angles;          // theta of ratio-0 layers
  RopeAngles compress_angles;        // theta and YaRN of layers with compression
  float* decision_margin = nullptr;  // [num_tokens] running minimum, nullptr: not wanted

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  bool round() const { return !precision.exact; }
};

// Scratch arrays by name, sized for the largest step so far and reused by every layer.
struct LayerScratch {
  std::vector<float> y, sublayer_out, post, comb;                     // hyper-connections
  std::vector<float> q_low, q, kv, attn_out, o_low;                   // attention
  std::vector<float> comp_value, comp_gate, rows;                     // compressor
  std::vector<float> index_q, index_weight, index_value, index_gate;  // indexer
  std::vector<int32_t> selected;
  std::vector<float> router_logits, topk_weights, margin;  // router
  std::vector<int32_t> topk_idx;
};

// streams: [num_tokens, num_hc, hidden], updated in place. Extends the layer's part of every slice's cache.
void run_layer(const StepContext& step, int layer_idx, LayerScratch& scratch, float* streams);

}  // namespace dsv4
