// A counter-based generator (splitmix64), so that any row can be made by any thread.
#include "checkpoint/synth_values.h"

#include <algorithm>
#include <cmath>

#include "codec/bf16.h"

namespace dsv4 {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

uint64_t key_of(uint64_t seed, const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ull ^ mix(seed + kGolden);  // FNV-1a, start moved by the seed
  for (unsigned char byte : name) hash = (hash ^ byte) * 0x100000001b3ull;
  return mix(hash);
}

// Sum of four 16-bit uniforms: near enough to a normal, and exact integer arithmetic up to one rounding.
float normal(uint64_t bits) {
  const int64_t sum =
      static_cast<int64_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  return static_cast<float>(sum - 131070) * (1.0f / 37837.0f);  // 65536 / sqrt(3)
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
  const uint64_t first = static_cast<uint64_t>(row * cols_);
  for (int64_t col = 0; col < cols_; ++col) {
    const float value = mean_ + deviation_ * normal(mix(key_ + (first + static_cast<uint64_t>(col)) * kGolden));
    out[col] = round_ ? round_bf16(value) : value;
  }
  for (int stream = 0; stream < comb_streams_; ++stream) out[2 * comb_streams_ + stream * (comb_streams_ + 1)] += 2.0f;
}

void fill_synth_expert_row(uint64_t seed, const std::string& name, int64_t token, int num_experts, int num_topk,
                           int64_t* out) {
  const uint64_t key = key_of(seed, name) + static_cast<uint64_t>(token) * kGolden;
  // Floyd's sampling: distinct without retries.
  for (int k = 0; k < num_topk; ++k) {
    const int64_t bound = num_experts - num_topk + k;
    const int64_t pick = static_cast<int64_t>(mix(key + static_cast<uint64_t>(k) * 0xd1342543de82ef95ull) %
                                              static_cast<uint64_t>(bound + 1));
    out[k] = std::find(out, out + k, pick) == out + k ? pick : bound;
  }
}

float synth_uniform(uint64_t seed, const std::string& name) {
  return static_cast<float>(key_of(seed, name) >> 40) * 0x1p-24f;
}

}  // namespace dsv4
