// The whole model: prefill and decode speed of a checkpoint, or of a synthetic one of a known shape.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "base/json.h"
#include "bench/bench.h"

namespace dsv4::bench {

struct ModelBenchOptions {
  std::string folder;  // empty: a synthetic ModelOpt checkpoint of shape is written to a temporary folder
  std::string shape = "demo";
  int num_layers = 0;   // 0: all of the shape
  int num_experts = 0;  // 0: all of the shape
  int num_threads = 0;
  bool pin_threads = false;
  CpuIsa isa = CpuIsa::kReference;
  int64_t prompt_tokens = 512;
  int64_t decode_tokens = 64;
  int repetitions = 3;  // medians are reported
};

struct ModelBenchResult {
  double prefill_tokens_per_second = 0;
  double decode_tokens_per_second = 0;
  double load_seconds = 0;     // open, check, repack
  double bytes_per_token = 0;  // weights one decoded token reads
  int64_t resident_bytes = 0;  // VmHWM
};

ModelBenchResult bench_model(const ModelBenchOptions& options, const std::function<void(const std::string&)>& progress);

}  // namespace dsv4::bench
