// Sampling flags of generate and chat; unset ones take generation_config.json's values.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/generate.h"

namespace dsv4::app {

struct SamplingOptions {
  std::optional<float> temperature, top_p;
  std::optional<int> top_k;
  float min_p = 0;
  uint64_t seed = 0;
  int64_t max_tokens = 256;
  std::vector<std::string> stop;
};

void add_sampling_options(CLI::App& command, SamplingOptions& options);
GenerateOptions to_generate_options(const SamplingOptions& options, const GenerationDefaults& defaults);

// "prefill 512 tokens, 4100 tokens/s; decode 128 tokens, 630 tokens/s (25.8 GB/s of weights)" on stderr.
void print_statistics(const GenerateResult& result, double bytes_per_token);

}  // namespace dsv4::app
