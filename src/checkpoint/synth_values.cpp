// A counter-based generator (splitmix64), so that any row can be made by any thread.
#include "checkpoint/synth_values.h"

#include <algorithm>
#include <cmath>

#include "checkpoint/synth_loops.h"

namespace dsv4 {
namespace {

uint64_t key_of(uint64_t seed, const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ull ^ synth_mix(seed + kSynthGolden);  // FNV-1a, start moved by the seed
  for (unsigned char byte : name) hash = (hash ^ byte) * 0x100000001b3ull;
  return synth_mix(hash);
}

bool ends_with(const std::string& text, std::string_view end) { return std::string_view(text).ends_with(end); }

}  // namespace

SynthSource::SynthSource(uint64_t seed, const LogicalTensor& tensor, const ModelConfig& config)
    : key_(key_of(seed, tensor.name)),
      rows_(tensor.shape.size() == 2 ? tensor.shape[0] : 1),
      cols_(tensor.shape.back()),
      round_(tensor.tensor_class != TensorClass::kF32) {
  const std::string& name = tensor.name;
  // Outputs of about unit size from inputs of unit size; gates, scores and mixing logits in the range where they matter.
  const float fan_in = 1.0f / std::sqrt(static_cast<float>(cols_));
  if (tensor.tensor_class == TensorClass::kNorm || ends_with(name, "_scale")) {
    mean_ = 1.0f;
    deviation_ = 0.1f;
  } else if (tensor.role == TensorRole::kHyperConnection) {
    deviation_ = ends_with(name, "_fn") ? 0.5f * fan_in : 0.5f;
    if (ends_with(name, "_base") && rows_ == 1 && cols_ > config.num_hc) comb_streams_ = config.num_hc;
  } else if (ends_with(name, "gate.bias")) {
    deviation_ = 0.1f;
  } else if (ends_with(name, "ape")) {
    deviation_ = 0.5f;
  } else if (name == "head") {
    deviation_ = 2.0f * fan_in;
  } else if (tensor.is_matrix() && name != "embed") {
    deviation_ = fan_in;
  }
}

void SynthSource::fill_row(int64_t row, float* out) const {
  synth_normals(key_, static_cast<uint64_t>(row * cols_), cols_, mean_, deviation_, round_, out);
  for (int stream = 0; stream < comb_streams_; ++stream) out[2 * comb_streams_ + stream * (comb_streams_ + 1)] += 2.0f;
}

void fill_synth_expert_row(uint64_t seed, const std::string& name, int64_t token, int num_experts, int num_topk,
                           int64_t* out) {
  const uint64_t key = key_of(seed, name) + static_cast<uint64_t>(token) * kSynthGolden;
  // Floyd's sampling: distinct without retries.
  for (int k = 0; k < num_topk; ++k) {
    const int64_t bound = num_experts - num_topk + k;
    const int64_t pick = static_cast<int64_t>(synth_mix(key + static_cast<uint64_t>(k) * 0xd1342543de82ef95ull) %
                                              static_cast<uint64_t>(bound + 1));
    out[k] = std::find(out, out + k, pick) == out + k ? pick : bound;
  }
}

float synth_uniform(uint64_t seed, const std::string& name) {
  return static_cast<float>(key_of(seed, name) >> 40) * 0x1p-24f;
}

}  // namespace dsv4
