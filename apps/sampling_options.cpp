// Sampling flags and the closing statistics line.
#include "sampling_options.h"

#include <cstdio>

namespace dsv4::app {

void add_sampling_options(CLI::App& command, SamplingOptions& options) {
  command.add_option("-n,--max-tokens", options.max_tokens, "most tokens to generate")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->capture_default_str();
  command.add_option("--temp", options.temperature, "temperature, 0: greedy (default: generation_config.json)")
      ->check(CLI::Range(0.0f, 100.0f));
  command
      .add_option("--top-p", options.top_p,
                  "smallest set of tokens with this probability (default: generation_config.json)")
      ->check(CLI::Range(0.0f, 1.0f));
  command.add_option("--top-k", options.top_k, "the k likeliest tokens, 0: all (default: generation_config.json)")
      ->check(CLI::Range(0, 1 << 30));
  command.add_option("--min-p", options.min_p, "drop tokens below this share of the likeliest one's probability")
      ->check(CLI::Range(0.0f, 1.0f))
      ->capture_default_str();
  command.add_option("--seed", options.seed, "same seed, same text")->capture_default_str();
  command.add_option("--stop", options.stop, "stop before this text; may be given several times");
}

GenerateOptions to_generate_options(const SamplingOptions& options, const GenerationDefaults& defaults) {
  GenerateOptions generate;
  generate.sampling.temperature = options.temperature.value_or(defaults.do_sample ? defaults.temperature : 0.0f);
  generate.sampling.top_p = options.top_p.value_or(defaults.top_p);
  generate.sampling.top_k = options.top_k.value_or(defaults.top_k);
  generate.sampling.min_p = options.min_p;
  generate.seed = options.seed;
  generate.max_tokens = options.max_tokens;
  generate.stop = options.stop;
  return generate;
}

void print_statistics(const GenerateResult& result, double bytes_per_token) {
  std::fprintf(stderr,
               "prefill %lld tokens, %.1f tokens/s; decode %zu tokens, %.1f tokens/s (%.1f MB of weights per token, "
               "%.1f GB/s)\n",
               static_cast<long long>(result.prefill_tokens), result.prefill_tokens_per_second(), result.ids.size(),
               result.decode_tokens_per_second(), bytes_per_token / 1e6,
               bytes_per_token * result.decode_tokens_per_second() / 1e9);
}

}  // namespace dsv4::app
