// A checkpoint folder: config.json, one or many safetensors shards, and what each weight is stored as.
//
// open_checkpoint checks the inventory against the config (missing, extra, wrong shape or dtype: all reported at once) and
// recognises the variant per tensor (spec 7.1, 7.4, 7.5, plain BF16). It never copies weights and never sees a device.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "checkpoint/config.h"
#include "checkpoint/problems.h"
#include "checkpoint/safetensors.h"

namespace dsv4 {

// How one logical matrix "X.weight" is stored.
enum class StoredFormat : uint8_t {
  kF32,
  kBf16,
  kFp8Block,         // X.weight F8_E4M3 + X.scale, X.weight_scale or X.weight_scale_inv (F8_E8M0, F32 or BF16), 128x128
  kMxfp4,            // X.weight I8 + X.scale F8_E8M0 [rows, cols/32]
  kNvfp4ModelOpt,    // X.weight U8 + X.weight_scale F8_E4M3 + X.weight_scale_2 F32 (+ X.input_scale F32)
  kNvfp4Compressed,  // X.weight_packed U8 + X.weight_scale F8_E4M3 + X.weight_global_scale F32 (+ X.input_global_scale)
};
constexpr int kNumStoredFormats = 6;
std::string_view stored_format_name(StoredFormat format);

// A logical matrix with the tensors it is made of; which are set depends on format. Views point into the map.
struct StoredMatrix {
  std::string name;  // without ".weight": "layers.0.attn.wq_a"
  std::string file;  // that holds its tensors, for messages; several are separated by commas
  StoredFormat format = StoredFormat::kBf16;
  int64_t rows = 0;  // logical
  int64_t cols = 0;
  TensorView weight;
  TensorView scale;                  // kFp8Block, kMxfp4, kNvfp4*: per-block or per-group scales
  float global_scale = 1.0f;         // kNvfp4*: decode multiplier (already inverted for kNvfp4Compressed)
  std::optional<float> input_scale;  // decode multiplier, if the file has one
};

class Checkpoint {
 public:
  const std::string& folder() const { return folder_; }
  const ModelConfig& config() const { return config_; }
  const Json& config_json() const { return config_json_; }
  const GenerationDefaults& generation_defaults() const { return generation_; }

  const std::vector<std::unique_ptr<SafetensorsFile>>& files() const { return files_; }
  // Views live as long as the checkpoint; so none is given by a temporary one.
  const TensorView* find(std::string_view name) const&;
  const TensorView* find(std::string_view name) && = delete;
  // Throws bad input naming the folder and tensor if absent.
  const TensorView& at(std::string_view name) const&;
  const TensorView& at(std::string_view name) && = delete;
  // The file that holds it, for messages; the folder if absent.
  const std::string& file_of(std::string_view name) const;
  // "layers.0.attn.wq_a" -> its stored form. Throws if absent or inconsistent. The scale bytes are not read: loaders call
  // validate_scales (checkpoint/stored_matrix.h).
  StoredMatrix matrix(std::string_view name_without_weight) const&;
  StoredMatrix matrix(std::string_view name_without_weight) && = delete;

 private:
  friend class CheckpointReader;
  struct Located {
    const TensorView* tensor;
    const SafetensorsFile* file;
  };
  std::string folder_;
  ModelConfig config_;
  Json config_json_;
  GenerationDefaults generation_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::unordered_map<std::string_view, Located> by_name_;  // keys point into files_
};

// Throws one bad-input error that lists every problem found.
Checkpoint open_checkpoint(const std::string& folder);

// What could be read of a folder that may be broken. Empty problems: checkpoint is what open_checkpoint returns.
struct CheckpointAttempt {
  Checkpoint checkpoint;
  bool has_config = false;  // checkpoint.config() is valid
  ProblemList problems;
};
CheckpointAttempt try_open_checkpoint(const std::string& folder);

}  // namespace dsv4
