// What quantize will write, decided before anything is read but headers: one job per matrix, the tensors of every shard.
//
// The plan depends on the source's headers and on the options only, so a resumed run makes the same one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/inventory.h"
#include "checkpoint/quantize/quantize.h"

namespace dsv4 {

enum class MatrixAction : uint8_t {
  kCopy,         // the tensors as they are
  kEncodeNvfp4,  // weight rule on decoded values
  kCastMxfp4,    // lossless, or kEncodeNvfp4 where that is impossible
  kRenameNvfp4,  // compressed-tensors -> ModelOpt names, global scale inverted
  kEncodeFp8,    // 128x128 blocks, ue8m0 scales
  kRenameFp8,    // weight copied, block scales under the official name as E8M0 (copied) or F32
};

struct MatrixJob {
  StoredMatrix matrix;
  TensorRole role = TensorRole::kRoutedExpert;
  std::string kind;  // row of the statistics
  MatrixAction action = MatrixAction::kCopy;
  int partner = -1;  // the job whose amax shares the global scale (w1 <-> w3 of a routed expert)
};

// One tensor of the target and where its bytes come from.
enum class OutputPart : uint8_t { kSource, kCodes, kSf, kGlobal, kInputScale };
struct OutputTensor {
  TensorSpec spec;
  OutputPart part = OutputPart::kSource;
  int job = -1;                        // kSource too, when the tensor belongs to a matrix
  const TensorView* source = nullptr;  // kSource
  uint64_t bytes = 0;
};

struct OutputShard {
  std::string file_name;
  std::vector<OutputTensor> tensors;  // in the order of the file: every tensor starts at a multiple of its element size
  uint64_t bytes = 0;                 // of all tensors
};

struct QuantizePlan {
  std::vector<MatrixJob> jobs;
  std::vector<OutputShard> shards;
  uint64_t target_bytes = 0;
};

// Throws bad input: a matrix that cannot be converted; nothing to convert at all.
QuantizePlan plan_quantize(const Checkpoint& checkpoint, const QuantizeOptions& options);

// Names of modules that are NVFP4 in the target, without ".weight", in model order.
std::vector<std::string> nvfp4_matrix_names(const QuantizePlan& plan);
bool has_fp8_matrices(const QuantizePlan& plan);

}  // namespace dsv4
