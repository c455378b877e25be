// dsv4 quantize as a library call: a checkpoint folder in, a ModelOpt-style NVFP4 folder out.
//
// Routed experts become NVFP4, dense matrices what DenseFormat says, everything else (mtp.* too) is copied unchanged.
//   BF16, F32, FP8 blocks   the weight rule of codec/nvfp4.h under one of three ScaleRules
//   MXFP4                   lossless cast; a tensor whose exponents span too much is requantised and named in notes
//   compressed-tensors      renamed, codes and scale factors untouched, global scale inverted
//   ModelOpt NVFP4          copied (NVFP4 is never re-rounded); refused when nothing would change
//
// The target appears whole: all files are made in "<target>.partial", which is renamed at the end. A journal there lists
// finished shards with size and checksum, so a killed run continues where it was; it stays in the target as
// dsv4_quantize.json (what was made from what, and the error of it). The result does not depend on threads or interruptions.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

enum class DenseFormat : uint8_t { kKeep, kFp8, kNvfp4 };

// How sf is chosen. All three start from ModelOpt's sf, and no group's squared error is ever above ModelOpt's.
enum class ScaleRule : uint8_t {
  kModelOpt,     // byte for byte the weight rule
  kMse,          // the ue4m3 code with the least squared error among the neighbours of the rule's
  kFourOverSix,  // amax on 6 or on 4, whichever has less squared error
};

std::string_view dense_format_name(DenseFormat format);  // "keep", "fp8", "nvfp4"
std::string_view scale_rule_name(ScaleRule rule);        // "modelopt", "mse", "4over6"

struct QuantizeOptions {
  std::string source;
  std::string target;
  DenseFormat dense = DenseFormat::kKeep;
  ScaleRule scale = ScaleRule::kModelOpt;
  int num_threads = 0;                // 0 = all CPUs
  uint64_t shard_bytes = 4ull << 30;  // a shard is closed before it would exceed this
  bool overwrite = false;             // replace an existing target, drop a partial of other options
};

struct QuantizeProgress {
  uint64_t done_bytes;  // of the target
  uint64_t total_bytes;
  uint64_t resumed_bytes;  // part of done_bytes that an earlier run made
  std::string_view tensor;
};

// Sums over all converted matrices of one kind.
struct QuantizeKindStats {
  std::string kind;      // "routed experts w1, w3", "attention", ...
  std::string from, to;  // stored formats
  int64_t num_matrices = 0;
  int64_t num_elements = 0;
  int64_t num_groups = 0;     // scale groups: 16 elements (NVFP4), 128x128 (FP8)
  int64_t num_saturated = 0;  // groups with an element further outside the code range than rounding could explain
  int64_t num_zeroed = 0;     // groups that were not zero and now are
  uint64_t source_bytes = 0;
  uint64_t target_bytes = 0;
  double error_sq = 0;  // sum (w - w')^2
  double norm_sq = 0;   // sum w^2

  double relative_error() const;
};

struct QuantizeReport {
  std::vector<QuantizeKindStats> kinds;  // converted matrices, then one row for what was copied
  std::vector<std::string> notes;        // what a user should know: requantised MXFP4 tensors, unequal w1/w3 globals
  uint64_t source_bytes = 0;
  uint64_t target_bytes = 0;
  int num_shards = 0;
  int num_resumed_shards = 0;
  bool already_complete = false;  // the target was there, made from this source with these options
};

// Throws: bad input (source unusable, NaN or infinite weights, target made by other options), usage (target inside source),
// resource missing (no space, read-only).
QuantizeReport quantize_checkpoint(const QuantizeOptions& options,
                                   const std::function<void(const QuantizeProgress&)>& progress = nullptr);

}  // namespace dsv4
