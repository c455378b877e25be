// What a user wants to know of a checkpoint folder before loading it: kinds, sizes, memory per token, every problem.
//
// Works on broken folders too: what could be read is reported, has_config and problems say what could not.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "checkpoint/config.h"
#include "checkpoint/inventory.h"
#include "checkpoint/problems.h"

namespace dsv4 {

// Memory one sequence needs in one pair of cache formats (spec 6.2).
struct KvCost {
  std::string kv;     // bf16, fp8, nvfp4
  std::string index;  // bf16, fp8, fp4
  int64_t row_bytes = 0;
  int64_t index_key_bytes = 0;
  double growing_bytes_per_token = 0;  // limit of long contexts
  int64_t fixed_bytes = 0;             // window rings and compressor states, whatever the length
  struct At {
    int64_t context = 0;
    int64_t bytes = 0;  // in all, fixed_bytes included
    double bytes_per_token() const { return static_cast<double>(bytes) / static_cast<double>(context); }
  };
  std::array<At, 3> at;  // 4K, 64K, 1M tokens
};
std::vector<KvCost> kv_costs(const ModelConfig& config);

struct ParameterCount {
  int64_t total = 0;   // all matrices, norms and mHC parameters of the main layers; not tid2eid, not mtp
  int64_t active = 0;  // touched for one token: routed experts count num_topk / num_experts, the embedding not at all
};
ParameterCount count_parameters(const ModelConfig& config);

struct InspectReport {
  std::string folder;
  bool usable = false;  // no problems: open_checkpoint accepts it and every scale is a number
  ProblemList problems;

  bool has_config = false;  // what is below of config is valid
  ModelConfig config;
  int num_layers_by_kind[3] = {};  // indexed by LayerKind
  ParameterCount parameters;
  std::vector<KvCost> kv;

  std::string tokenizer;  // one line for people; set by the application, which may use the text library (this may not)
  std::string variant;    // from what is stored: "ModelOpt NVFP4 experts, FP8 blocks", ...
  int num_files = 0;
  int64_t num_tensors = 0;
  int64_t bytes = 0;  // of tensor data
  std::array<int64_t, kNumTensorRoles> bytes_by_role{};
  int64_t unknown_bytes = 0;                       // tensors the configuration does not know
  std::map<std::string, int64_t> bytes_by_format;  // "NVFP4 ModelOpt" with scales, or a dtype for what is no matrix
};

InspectReport inspect_checkpoint(const std::string& folder);
std::string inspect_text(const InspectReport& report);
Json inspect_json(const InspectReport& report);

}  // namespace dsv4
