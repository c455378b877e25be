// The tensors a model of a given configuration has: names, logical shapes, roles (spec 7.2).
//
// One list serves the inventory check of open_checkpoint, synth and inspect. mtp.* (draft layers) is not in it: those
// tensors are known and tolerated in a checkpoint, and not used.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/config.h"
#include "checkpoint/problems.h"
#include "tensor/tensor.h"

namespace dsv4 {

class Checkpoint;

// What a tensor belongs to; inspect sums bytes and parameters by it.
enum class TensorRole : uint8_t {
  kEmbedding,
  kHead,
  kNorm,
  kHyperConnection,
  kAttention,
  kCompressor,
  kIndexer,
  kRouter,
  kSharedExpert,
  kRoutedExpert,
  kMtp,
};
constexpr int kNumTensorRoles = 11;
std::string_view tensor_role_name(TensorRole role);  // "routed experts", ...

// What it may be stored as.
enum class TensorClass : uint8_t {
  kQuantisable,  // matrix in any StoredFormat; name is without ".weight"
  kPlainMatrix,  // matrix, BF16 or F32; name is without ".weight"
  kNorm,         // BF16 or F32; name is the full name
  kF32,          // F32 only; full name
  kExpertTable,  // I64 or I32; full name
};

struct LogicalTensor {
  std::string name;
  TensorRole role = TensorRole::kNorm;
  TensorClass tensor_class = TensorClass::kNorm;
  Shape shape;     // logical: [out, in] for matrices
  int layer = -1;  // -1: top level

  bool is_matrix() const {
    return tensor_class == TensorClass::kQuantisable || tensor_class == TensorClass::kPlainMatrix;
  }
};

std::vector<LogicalTensor> list_tensors(const ModelConfig& config);

inline bool is_mtp_tensor(std::string_view name) { return name.starts_with("mtp."); }

// Adds what is missing, extra, or of a wrong shape or dtype.
void check_inventory(const Checkpoint& checkpoint, ProblemList& problems);

}  // namespace dsv4
