// What a synthetic checkpoint stores for one logical tensor, and the bytes of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/threads.h"
#include "checkpoint/inventory.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/synth.h"
#include "checkpoint/synth_values.h"
#include "codec/fp8_block.h"
#include "codec/nvfp4.h"

namespace dsv4 {

enum class SynthPartKind : uint8_t {
  kBf16,
  kF32,
  kExpertTable,
  kFp8Codes,
  kFp8Scales,
  kMxfp4Codes,
  kMxfp4Scales,
  kNvfp4Codes,
  kNvfp4Scales,
  kGlobalScale,
  kGlobalScaleRcp,
  kInputScale,
  kInputScaleRcp,
};

// One tensor of a file.
struct SynthPart {
  TensorSpec spec;
  SynthPartKind kind;
  const LogicalTensor* tensor;

  int64_t rows() const { return spec.shape.size() == 2 ? spec.shape[0] : 1; }
  int64_t cols() const { return spec.shape.empty() ? 1 : spec.shape.back(); }
  int64_t row_bytes() const { return cols() * dtype_bytes(spec.dtype); }
  int64_t bytes() const { return rows() * row_bytes(); }
  // Rows that are made together: a tile row of an FP8 matrix shares its scales.
  int64_t rows_per_unit() const { return kind == SynthPartKind::kFp8Codes ? kFp8WeightBlock : 1; }
};

std::vector<SynthPart> list_synth_parts(const LogicalTensor& tensor, SynthVariant variant);

// Not shared between writers: holds scratch per thread and the global scales found so far.
class SynthEncoder {
 public:
  SynthEncoder(const ModelConfig& config, const SynthOptions& options);

  // Calls sink(piece) for consecutive pieces of the part; the sink may keep them.
  void encode(const SynthPart& part, const std::function<void(std::vector<std::byte>)>& sink);

 private:
  // The matrix as bf16 values, made once: its amax is wanted before its codes, and by w1 that of w3, too.
  struct Staged {
    std::vector<uint16_t> values;
    float amax = 0.0f;
  };
  Staged& stage(const LogicalTensor& tensor);
  GlobalScale global_scale(const LogicalTensor& tensor);
  float input_scale(const LogicalTensor& tensor) const;
  void encode_unit(const SynthPart& part, const SynthSource& source, GlobalScale global, int64_t unit, std::byte* out,
                   std::vector<float>& values);
  void encode_fp8_tiles(SynthPartKind kind, const SynthSource& source, int64_t tile_row, uint8_t* out,
                        std::vector<float>& values) const;

  const ModelConfig& config_;
  SynthVariant variant_;
  uint64_t seed_;
  ThreadPool pool_;
  std::vector<std::vector<float>> scratch_;  // [num_threads]
  // Scale factors of the NVFP4 matrix whose codes were made last: they come out of the same pass and follow in the file.
  std::vector<std::byte> sf_;
  std::string sf_owner_;
  std::unordered_map<std::string, GlobalScale> globals_;
  std::unordered_map<std::string, Staged> staged_;  // by name, until the codes are made
  std::vector<std::vector<uint16_t>> spare_;        // memory of those that are done
};

}  // namespace dsv4
