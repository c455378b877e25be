// The random values of a synthetic checkpoint: a pure function of seed, tensor name and element.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/inventory.h"

namespace dsv4 {

class SynthSource {
 public:
  SynthSource(uint64_t seed, const LogicalTensor& tensor, const ModelConfig& config);

  // The row as two-dimensional tensors have them; a vector is one row. Values are bf16 numbers unless the tensor is F32.
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  void fill_row(int64_t row, float* out) const;  // [cols]

 private:
  uint64_t key_;
  int64_t rows_;
  int64_t cols_;
  float mean_ = 0.0f;
  float deviation_ = 1.0f;
  bool round_ = true;
  int comb_streams_ = 0;  // hc_*_base: the mixing matrix leans to the identity
};

// One row of tid2eid: num_topk distinct experts.
void fill_synth_expert_row(uint64_t seed, const std::string& name, int64_t token, int num_experts, int num_topk,
                           int64_t* out);

// In 0..1, the same for the same arguments.
float synth_uniform(uint64_t seed, const std::string& name);

}  // namespace dsv4
