// How one matrix is stored, recognised from the tensors beside it, and whether its scales are usable.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/checkpoint.h"

namespace dsv4 {

// problem is empty when matrix is valid. tensor_names: every tensor that belongs to the matrix, also with a problem;
// empty when no tensor of that name exists.
struct MatrixSearch {
  StoredMatrix matrix;
  std::string problem;
  std::vector<std::string> tensor_names;
};
MatrixSearch search_matrix(const Checkpoint& checkpoint, std::string_view name_without_weight);

// NaN or negative scales (one pass over matrix.scale): the first one, or nothing.
std::optional<std::string> find_scale_problem(const StoredMatrix& matrix);

// Expert ids outside 0..num_experts-1 in a tid2eid table (I64 or I32): the first one, or nothing. name is for the message: the
// file and the tensor.
std::optional<std::string> find_expert_table_problem(std::string_view name, const TensorView& table, int num_experts);

// The same, throwing bad input. For loaders: call on every matrix and table before use.
void validate_scales(const StoredMatrix& matrix);
void validate_expert_table(std::string_view name, const TensorView& table, int num_experts);

}  // namespace dsv4
