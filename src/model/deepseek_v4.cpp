// Embedding, the layers, the head.
#include "model/deepseek_v4.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "model/layer.h"
#include "ops/gemm/gemm.h"
#include "ops/gemm/gemm_pack.h"
#include "ops/norm/norm.h"
#include "ops/vec/vec.h"

namespace dsv4 {

struct DeepseekV4::Workspace {
  LayerScratch layer;
  std::vector<float> streams;       // [num_tokens, num_hc, hidden]
  std::vector<float> head_streams;  // the same for tokens whose logits are wanted
  std::vector<float> head_in;       // [wanted, hidden]
};

namespace {

Precision checked_precision(const Precision& precision, const ModelConfig& config) {
  if (precision.kv == KvFormat::kNvfp4 && config.nope_dim() % kNvfp4GroupSize != 0)
    throw_bad_input("--kv nvfp4 needs head_dim - qk_rope_head_dim to be a multiple of {}, this model has {}",
                    kNvfp4GroupSize, config.nope_dim());
  return precision;
}

RopeAngles step_angles(const RopeFreqs& freqs, const StepContext& step) {
  const int64_t num_pairs = static_cast<int64_t>(freqs.freqs.size());
  RopeAngles angles;
  angles.cos.resize(static_cast<size_t>(step.num_tokens() * num_pairs));
  angles.sin.resize(angles.cos.size());
  for (const SequenceSlice& slice : step.slices)
    for_rows(step.cpu, slice.num_tokens, 32 * num_pairs, [&](int64_t t) {
      const int64_t at = (slice.first_token + t) * num_pairs;
      rope_angles(freqs, slice.first_position + t, &angles.cos[static_cast<size_t>(at)],
                  &angles.sin[static_cast<size_t>(at)]);
    });
  return angles;
}

StepContext make_step(std::span<const SequenceInput> inputs, const ModelConfig& config, const ModelWeights& weights,
                      const Precision& precision, const CpuContext& cpu) {
  StepContext step{config, weights, precision, cpu};
  for (const SequenceInput& input : inputs) {
    if (input.tokens.empty()) continue;
    step.slices.push_back(
        {input.cache, step.num_tokens(), static_cast<int64_t>(input.tokens.size()), input.cache->num_tokens()});
    step.token_ids.insert(step.token_ids.end(), input.tokens.begin(), input.tokens.end());
  }
  step.window_angles = step_angles(weights.window_rope, step);
  step.compress_angles = step_angles(weights.compress_rope, step);
  return step;
}

// Every stream starts as the token's embedding.
void embed(const StepContext& step, float* streams) {
  const WeightView& table = step.weights.embed.view;
  const int64_t hidden = step.config.hidden, num_hc = step.config.num_hc;
  const VecKernels& vec = vec_kernels(step.cpu.isa);
  for (int64_t token = 0; token < step.num_tokens(); ++token) {
    float* first = streams + token * num_hc * hidden;
    const int64_t row = step.token_ids[static_cast<size_t>(token)];
    if (table.format == WeightFormat::kBf16) {
      vec.decode_bf16(static_cast<const uint16_t*>(table.data) + row * hidden, hidden, first);
    } else {
      for (int64_t c = 0; c < hidden; ++c) first[c] = decode_weight(table, row, c);
    }
    for (int64_t j = 1; j < num_hc; ++j) std::copy_n(first, hidden, first + j * hidden);
  }
}

std::vector<int64_t> wanted_tokens(std::span<const SequenceInput> inputs) {
  std::vector<int64_t> wanted;
  int64_t first = 0;
  for (const SequenceInput& input : inputs) {
    const int64_t count = static_cast<int64_t>(input.tokens.size());
    if (count > 0 && input.want != WantLogits::kNone)
      for (int64_t t = input.want == WantLogits::kAll ? 0 : count - 1; t < count; ++t) wanted.push_back(first + t);
    first += count;
  }
  return wanted;
}

CompressorShape compressor_shape(const ModelConfig& config, int layer, int dim) {
  return {config.compress_ratios[static_cast<size_t>(layer)], config.layer_kind(layer) == LayerKind::kCsa, dim,
          config.rope_dim};
}

}  // namespace

DeepseekV4::DeepseekV4(std::shared_ptr<const Checkpoint> checkpoint, Precision precision, CpuContext context)
    : checkpoint_(std::move(checkpoint)),
      precision_(checked_precision(precision, checkpoint_->config())),
      context_(context),
      weights_(load_weights(*checkpoint_, context)),
      workspace_(std::make_unique<Workspace>()) {}

DeepseekV4::~DeepseekV4() = default;

SequenceCache DeepseekV4::new_sequence(int64_t max_chunk) const {
  const ModelConfig& c = config();
  CacheShape shape;
  shape.row = {precision_.kv, c.head_dim, c.rope_dim};
  shape.index_key = {precision_.index, c.index_head_dim};
  shape.window_len = c.window_len;
  shape.max_chunk = max_chunk;
  for (int layer = 0; layer < c.num_layers; ++layer) {
    LayerCacheShape layer_shape{};
    if (c.layer_kind(layer) != LayerKind::kWindow) layer_shape.compressor = compressor_shape(c, layer, c.head_dim);
    if (c.layer_kind(layer) == LayerKind::kCsa) layer_shape.index = compressor_shape(c, layer, c.index_head_dim);
    shape.layers.push_back(layer_shape);
  }
  return SequenceCache(std::move(shape));
}

void DeepseekV4::check_tokens(std::span<const int32_t> tokens, int64_t first_position) const {
  const int64_t end = first_position + std::ssize(tokens);
  if (end > config().max_position)
    throw_bad_input("sequence of {} tokens, the model's max_position_embeddings is {}", end, config().max_position);
  for (int32_t id : tokens)
    if (id < 0 || id >= config().vocab_size)
      throw_bad_input("token id {}, the vocabulary has 0..{}", id, config().vocab_size - 1);
}

int64_t DeepseekV4::forward(std::span<const SequenceInput> inputs, std::vector<float>& logits, StepObserver* observer) {
  for (const SequenceInput& input : inputs) {
    DSV4_CHECK(std::ssize(input.tokens) <= input.cache->shape().max_chunk, "{} tokens in a step, the cache takes {}",
               input.tokens.size(), input.cache->shape().max_chunk);
    check_tokens(input.tokens, input.cache->num_tokens());
  }
  StepContext step = make_step(inputs, config(), weights_, precision_, context_);
  if (step.num_tokens() == 0) return 0;
  if (observer != nullptr && observer->decision_margin != nullptr) {
    observer->decision_margin->assign(static_cast<size_t>(step.num_tokens()), std::numeric_limits<float>::infinity());
    step.decision_margin = observer->decision_margin->data();
  }
  const int64_t width = config().num_hc * config().hidden;
  Workspace& work = *workspace_;
  work.streams.resize(static_cast<size_t>(step.num_tokens() * width));

  embed(step, work.streams.data());
  for (int layer = 0; layer < config().num_layers; ++layer) {
    run_layer(step, layer, work.layer, work.streams.data());
    if (observer != nullptr && observer->on_layer) observer->on_layer(layer, work.streams.data(), step.num_tokens());
  }
  for (const SequenceSlice& slice : step.slices) slice.cache->advance(slice.num_tokens);

  const std::vector<int64_t> wanted = wanted_tokens(inputs);
  const int64_t num_wanted = static_cast<int64_t>(wanted.size());
  work.head_streams.resize(static_cast<size_t>(num_wanted * width));
  work.head_in.resize(static_cast<size_t>(num_wanted * config().hidden));
  for (int64_t i = 0; i < num_wanted; ++i)
    std::copy_n(work.streams.data() + wanted[static_cast<size_t>(i)] * width, width,
                work.head_streams.data() + i * width);
  const HcShape shape{num_wanted,      config().hidden,       config().num_hc, config().hc_sinkhorn_iters,
                      config().hc_eps, config().rms_norm_eps, step.round()};
  hc_head(shape, weights_.hc_head.params(), work.head_streams.data(), work.head_in.data(), context_);
  rms_norm({work.head_in.data(), weights_.norm.data(), work.head_in.data(), num_wanted, config().hidden,
            config().hidden, config().hidden, config().rms_norm_eps, step.round()},
           context_);
  logits.resize(static_cast<size_t>(num_wanted * config().vocab_size));
  gemm({work.head_in.data(), &weights_.head, logits.data(), num_wanted, config().hidden, config().vocab_size,
        /*round_output=*/false, /*x_is_bf16=*/step.round()},
       context_);
  return num_wanted;
}

int64_t DeepseekV4::repacked_bytes() const {
  int64_t bytes = 0;
  for (const Weight* weight : all_matrices(const_cast<ModelWeights&>(weights_)))
    if (packing_pays(weight->view, context_.isa)) bytes += packed_bytes(weight->view);
  return bytes;
}

void DeepseekV4::repack(const std::function<void(int64_t, int64_t)>& progress) {
  pack_weights(all_matrices(weights_), context_, progress);
}

double DeepseekV4::bytes_per_token() const {
  double bytes = gemm_cost(weights_.head.view, 1).bytes;
  const auto add = [&](const Weight& w) { bytes += static_cast<double>(w.view.stored_bytes()); };
  const auto add_compressor = [&](const CompressorWeights& w) { add(w.wkv), add(w.wgate); };
  const auto add_expert = [&](const ExpertWeights& w) { add(w.w1), add(w.w3), add(w.w2); };
  for (const LayerWeights& layer : weights_.layers) {
    const AttentionWeights& attn = layer.attn;
    add(attn.wq_a), add(attn.wq_b), add(attn.wkv), add(attn.wo_b);
    for (const Weight& group : attn.wo_a) add(group);
    if (attn.compressor) add_compressor(*attn.compressor);
    if (attn.indexer)
      add(attn.indexer->wq_b), add(attn.indexer->weights_proj), add_compressor(attn.indexer->compressor);
    add(layer.ffn.gate);
    for (int slot = 0; slot < config().num_topk; ++slot) add_expert(layer.ffn.experts[static_cast<size_t>(slot)]);
    if (layer.ffn.shared) add_expert(*layer.ffn.shared);
    bytes += 4.0 * static_cast<double>(layer.hc_attn.fn.size() + layer.hc_ffn.fn.size());
  }
  return bytes;
}

}  // namespace dsv4
