// run_layer and the two sub-layers.
#include "model/layer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/attention/attention.h"
#include "ops/compressor/compressor.h"
#include "ops/gemm/gemm.h"
#include "ops/hyper_connection/hyper_connection.h"
#include "ops/indexer/indexer.h"
#include "ops/moe/moe.h"
#include "ops/norm/norm.h"
#include "ops/rope/rope.h"
#include "ops/router/router.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

float* sized(std::vector<float>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}
int32_t* sized(std::vector<int32_t>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

// y = x W^T for every token of the step.
float* linear(const StepContext& step, const Weight& w, const float* x, std::vector<float>& y, bool round) {
  float* out = sized(y, step.num_tokens() * w.view.rows);
  gemm({x, &w, out, step.num_tokens(), w.view.cols, w.view.rows, round, /*x_is_bf16=*/step.round()}, step.cpu);
  return out;
}

void norm(const StepContext& step, const std::vector<float>& weight, float* x) {
  const int64_t dim = static_cast<int64_t>(weight.size());
  rms_norm({x, weight.data(), x, step.num_tokens(), dim, dim, dim, step.config.rms_norm_eps, step.round()}, step.cpu);
}

// Rotates the last rope_dim channels of `vectors_per_token` vectors of `dim` channels per token, then rounds those channels.
void rotate(const StepContext& step, const RopeAngles& angles, float* x, int vectors_per_token, int64_t dim,
            RopeDirection direction, bool round_all) {
  const VecKernels& vec = vec_kernels(step.cpu.isa);
  const int rope_dim = step.config.rope_dim, num_pairs = rope_dim / 2;
  for_rows(step.cpu, step.num_tokens() * vectors_per_token, 2 * rope_dim + (round_all ? dim : 0), [&](int64_t row) {
    const int64_t token = row / vectors_per_token;
    float* vector = x + row * dim;
    float* rotated = vector + dim - rope_dim;
    rope_rotate(rotated, angles.cos.data() + token * num_pairs, angles.sin.data() + token * num_pairs, num_pairs,
                direction);
    if (!step.round()) return;
    round_all ? vec.round_bf16(vector, dim) : vec.round_bf16(rotated, rope_dim);
  });
}

// q: low-rank projection, norm, up projection, per-head norm without weight, RoPE; rounded once after the last two.
float* project_q(const StepContext& step, const AttentionWeights& attn, const RopeAngles& angles, const float* q_low,
                 LayerScratch& scratch) {
  const ModelConfig& config = step.config;
  float* q = linear(step, attn.wq_b, q_low, scratch.q, step.round());
  const int64_t num_rows = step.num_tokens() * config.num_heads;
  rms_norm({q, nullptr, q, num_rows, config.head_dim, config.head_dim, config.head_dim, config.rms_norm_eps, false},
           step.cpu);
  rotate(step, angles, q, config.num_heads, config.head_dim, RopeDirection::kForward, /*round_all=*/true);
  return q;
}

float* project_kv(const StepContext& step, const AttentionWeights& attn, const RopeAngles& angles, const float* x,
                  LayerScratch& scratch) {
  float* kv = linear(step, attn.wkv, x, scratch.kv, step.round());
  norm(step, attn.kv_norm, kv);
  rotate(step, angles, kv, 1, step.config.head_dim, RopeDirection::kForward, /*round_all=*/false);
  return kv;
}

struct CompressorStep {
  const CompressorWeights& weights;
  CompressorShape shape;
  const float* value;  // [num_tokens, width]
  const float* gate;   // [num_tokens, width]
};

// Runs one slice through a compressor; finished rows land in scratch.rows. Returns their number.
int64_t compress_slice(const StepContext& step, const SequenceSlice& slice, const CompressorStep& comp,
                       CompressorState& state, LayerScratch& scratch) {
  const int64_t count = num_completed_windows(slice.first_position, slice.num_tokens, comp.shape.ratio);
  compress({.shape = comp.shape,
            .value = comp.value + slice.first_token * comp.shape.width(),
            .gate = comp.gate + slice.first_token * comp.shape.width(),
            .ape = comp.weights.ape.data(),
            .norm_weight = comp.weights.norm.data(),
            .rope = &step.weights.compress_rope,
            .state_value = state.value.data(),
            .state_gate = state.gate.data(),
            .rows = sized(scratch.rows, count * comp.shape.dim),
            .first_position = slice.first_position,
            .num_tokens = slice.num_tokens,
            .rms_eps = step.config.rms_norm_eps,
            .round_output = step.round()},
           step.cpu);
  return count;
}

struct IndexStep {
  const float* q;       // [num_tokens, index_num_heads, index_head_dim]
  const float* weight;  // [num_tokens, index_num_heads]
  const float* value;   // [num_tokens, index width]
  const float* gate;
};

// Index queries and head weights; the keys' projections.
IndexStep project_index(const StepContext& step, const IndexerWeights& indexer, const IndexKeyLayout& layout,
                        const float* x, const float* q_low, LayerScratch& scratch) {
  const ModelConfig& config = step.config;
  float* q = linear(step, indexer.wq_b, q_low, scratch.index_q, step.round());
  rotate(step, step.compress_angles, q, config.index_num_heads, config.index_head_dim, RopeDirection::kForward,
         /*round_all=*/false);
  for_rows(step.cpu, step.num_tokens() * config.index_num_heads, 16 * config.index_head_dim,
           [&](int64_t row) { index_round_trip(layout, q + row * config.index_head_dim, step.cpu.isa); });
  float* weight = linear(step, indexer.weights_proj, x, scratch.index_weight, step.round());
  const float factor =
      1.0f / std::sqrt(static_cast<float>(config.index_head_dim) * static_cast<float>(config.index_num_heads));
  for (int64_t i = 0; i < step.num_tokens() * config.index_num_heads; ++i) weight[i] *= factor;
  return {q, weight, linear(step, indexer.compressor.wkv, x, scratch.index_value, false),
          linear(step, indexer.compressor.wgate, x, scratch.index_gate, false)};
}

// Extends the slice's index keys, then chooses rows for each of its tokens into scratch.selected.
void select_rows(const StepContext& step, const SequenceSlice& slice, const IndexerWeights& indexer_weights,
                 const IndexStep& index, const CompressorShape& shape, LayerCache& cache, LayerScratch& scratch) {
  const ModelConfig& config = step.config;
  const IndexKeyLayout& layout = slice.cache->shape().index_key;
  const CompressorStep comp{indexer_weights.compressor, shape, index.value, index.gate};
  const int64_t num_keys = compress_slice(step, slice, comp, cache.index_compressor, scratch);
  for (int64_t r = 0; r < num_keys; ++r) {
    float* key = scratch.rows.data() + r * shape.dim;
    if (layout.format == IndexFormat::kFp8 || layout.format == IndexFormat::kFp4) hadamard(key, shape.dim);
    encode_index_key(layout, key, cache.index_keys.append());
  }
  float* margin = step.decision_margin == nullptr ? nullptr : sized(scratch.margin, slice.num_tokens);
  indexer({.q = index.q + slice.first_token * config.index_num_heads * config.index_head_dim,
           .head_weight = index.weight + slice.first_token * config.index_num_heads,
           .keys = cache.index_keys.view(),
           .layout = layout,
           .selected = sized(scratch.selected, slice.num_tokens * config.index_topk),
           .margin = margin,
           .first_position = slice.first_position,
           .num_tokens = slice.num_tokens,
           .num_heads = config.index_num_heads,
           .topk = config.index_topk,
           .compress_ratio = shape.ratio},
          step.cpu);
  for (int64_t t = 0; margin != nullptr && t < slice.num_tokens; ++t)
    step.decision_margin[slice.first_token + t] = std::min(step.decision_margin[slice.first_token + t], margin[t]);
}

// Inverse RoPE at the query position, grouped wo_a, wo_b.
void project_out(const StepContext& step, const AttentionWeights& attn, const RopeAngles& angles,
                 LayerScratch& scratch) {
  const ModelConfig& config = step.config;
  float* o = scratch.attn_out.data();
  const VecKernels& vec = vec_kernels(step.cpu.isa);
  const int64_t width = static_cast<int64_t>(config.num_heads) * config.head_dim;
  if (step.round())  // the attention kernel's bf16 output, before the rotation
    for_rows(step.cpu, step.num_tokens(), width, [&](int64_t token) { vec.round_bf16(o + token * width, width); });
  rotate(step, angles, o, config.num_heads, config.head_dim, RopeDirection::kInverse, /*round_all=*/false);
  const int64_t group_width = width / config.o_groups, low_width = config.o_groups * config.o_lora_rank;
  float* low = sized(scratch.o_low, step.num_tokens() * low_width);
  for (int group = 0; group < config.o_groups; ++group)
    gemm({o + group * group_width, &attn.wo_a[static_cast<size_t>(group)], low + group * config.o_lora_rank,
          step.num_tokens(), width, low_width, step.round(), /*x_is_bf16=*/step.round()},
         step.cpu);
  linear(step, attn.wo_b, low, scratch.sublayer_out, step.round());
}

// scratch.y -> scratch.sublayer_out
void attention_block(const StepContext& step, int layer_idx, LayerScratch& scratch) {
  const ModelConfig& config = step.config;
  const AttentionWeights& attn = step.weights.layers[static_cast<size_t>(layer_idx)].attn;
  const LayerKind kind = config.layer_kind(layer_idx);
  const RopeAngles& angles = kind == LayerKind::kWindow ? step.window_angles : step.compress_angles;
  const float* x = scratch.y.data();

  float* q_low = linear(step, attn.wq_a, x, scratch.q_low, step.round());
  norm(step, attn.q_norm, q_low);
  const float* q = project_q(step, attn, angles, q_low, scratch);
  const float* kv = project_kv(step, attn, angles, x, scratch);
  const float* value = attn.compressor ? linear(step, attn.compressor->wkv, x, scratch.comp_value, false) : nullptr;
  const float* gate = attn.compressor ? linear(step, attn.compressor->wgate, x, scratch.comp_gate, false) : nullptr;
  IndexStep index{};
  if (attn.indexer)
    index = project_index(step, *attn.indexer, step.slices[0].cache->shape().index_key, x, q_low, scratch);

  float* out = sized(scratch.attn_out, step.num_tokens() * config.num_heads * config.head_dim);
  for (const SequenceSlice& slice : step.slices) {
    const CacheShape& shape = slice.cache->shape();
    const LayerCacheShape& layer_shape = shape.layers[static_cast<size_t>(layer_idx)];
    LayerCache& cache = slice.cache->layer(layer_idx);
    for_rows(step.cpu, slice.num_tokens, 4 * config.head_dim, [&](int64_t t) {
      encode_kv_row(shape.row, kv + (slice.first_token + t) * config.head_dim,
                    cache.window_row(slice.first_position + t));
    });
    if (attn.indexer) select_rows(step, slice, *attn.indexer, index, layer_shape.index, cache, scratch);
    if (attn.compressor) {
      const CompressorStep comp{*attn.compressor, layer_shape.compressor, value, gate};
      const int64_t num_rows = compress_slice(step, slice, comp, cache.compressor, scratch);
      for (int64_t r = 0; r < num_rows; ++r)
        encode_kv_row(shape.row, scratch.rows.data() + r * config.head_dim, cache.compressed.append());
    }
    const int64_t first_head = slice.first_token * config.num_heads;
    attention({.q = q + first_head * config.head_dim,
               .out = out + first_head * config.head_dim,
               .lse = nullptr,
               .sink_logit = attn.sink_logit.data(),
               .window = cache.window(),
               .compressed = cache.compressed.view(),
               .layout = shape.row,
               .selected = attn.indexer ? scratch.selected.data() : nullptr,
               .max_selected = config.index_topk,
               .first_position = slice.first_position,
               .num_tokens = slice.num_tokens,
               .num_heads = config.num_heads,
               .window_len = config.window_len,
               .compress_ratio = layer_shape.compressor.ratio,
               .scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim))},
              step.cpu);
  }
  project_out(step, attn, angles, scratch);
}

// scratch.y -> scratch.sublayer_out
void ffn_block(const StepContext& step, int layer_idx, LayerScratch& scratch) {
  const ModelConfig& config = step.config;
  const FfnWeights& ffn = step.weights.layers[static_cast<size_t>(layer_idx)].ffn;
  const float* x = scratch.y.data();
  const int64_t num_tokens = step.num_tokens();
  const float* logits = linear(step, ffn.gate, x, scratch.router_logits, false);
  float* margin = step.decision_margin == nullptr ? nullptr : sized(scratch.margin, num_tokens);
  router({.logits = logits,
          .bias = ffn.gate_bias.empty() ? nullptr : ffn.gate_bias.data(),
          .hash_table = ffn.hash_table.empty() ? nullptr : ffn.hash_table.data(),
          .token_ids = step.token_ids.data(),
          .topk_idx = sized(scratch.topk_idx, num_tokens * config.num_topk),
          .topk_weights = sized(scratch.topk_weights, num_tokens * config.num_topk),
          .margin = margin,
          .num_tokens = num_tokens,
          .num_experts = config.num_experts,
          .num_topk = config.num_topk,
          .scaling_factor = config.routed_scaling_factor,
          .normalise = config.norm_topk_prob},
         step.cpu);
  for (int64_t t = 0; margin != nullptr && t < num_tokens; ++t)
    step.decision_margin[t] = std::min(step.decision_margin[t], margin[t]);
  moe({.x = x,
       .topk_idx = scratch.topk_idx.data(),
       .topk_weights = scratch.topk_weights.data(),
       .y = sized(scratch.sublayer_out, num_tokens * config.hidden),
       .experts = ffn.experts.data(),
       .shared = ffn.shared.get(),
       .num_tokens = num_tokens,
       .hidden = config.hidden,
       .inter = config.moe_inter,
       .num_experts = config.num_experts,
       .num_topk = config.num_topk,
       .swiglu_limit = config.swiglu_limit > 0 ? config.swiglu_limit : std::numeric_limits<float>::infinity(),
       .precision = step.precision},
      step.cpu);
}

}  // namespace

void run_layer(const StepContext& step, int layer_idx, LayerScratch& scratch, float* streams) {
  const ModelConfig& config = step.config;
  const LayerWeights& layer = step.weights.layers[static_cast<size_t>(layer_idx)];
  const HcShape shape{step.num_tokens(), config.hidden,       config.num_hc, config.hc_sinkhorn_iters,
                      config.hc_eps,     config.rms_norm_eps, step.round()};
  float* y = sized(scratch.y, shape.num_tokens * shape.hidden);
  float* post = sized(scratch.post, shape.num_tokens * shape.num_hc);
  float* comb = sized(scratch.comb, shape.num_tokens * shape.num_hc * shape.num_hc);

  hc_pre(shape, layer.hc_attn.params(), streams, y, post, comb, step.cpu);
  norm(step, layer.attn_norm, y);
  attention_block(step, layer_idx, scratch);
  hc_post(shape, scratch.sublayer_out.data(), post, comb, streams, step.cpu);

  hc_pre(shape, layer.hc_ffn.params(), streams, y, post, comb, step.cpu);
  norm(step, layer.ffn_norm, y);
  ffn_block(step, layer_idx, scratch);
  hc_post(shape, scratch.sublayer_out.data(), post, comb, streams, step.cpu);
}

}  // namespace dsv4
