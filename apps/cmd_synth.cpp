// dsv4 synth: writes a random checkpoint of any configuration, for tests and benchmarks.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "base/check.h"
#include "checkpoint/synth.h"
#include "commands.h"
#include "terminal.h"

namespace dsv4::app {
namespace {

struct SynthArguments {
  std::string destination;
  std::string config_path;
  std::string shape;
  std::string variant = "bf16";
  int num_layers = 0;
  int num_experts = 0;
  uint64_t seed = 1;
  int64_t shard_mb = 4096;
  int num_threads = 0;
};

void run_synth(const SynthArguments& arguments, const GlobalOptions& global) {
  if (arguments.config_path.empty() == arguments.shape.empty())
    throw_usage("synth needs one of --config FILE and --shape demo|flash|pro");
  SynthOptions options;
  options.config =
      arguments.shape.empty() ? read_json_file(arguments.config_path) : synth_shape_config(arguments.shape);
  options.variant = synth_variant_from_name(arguments.variant);
  options.seed = arguments.seed;
  options.shard_bytes = arguments.shard_mb << 20;
  options.num_threads = arguments.num_threads;
  resize_synth_config(options.config, arguments.num_layers, arguments.num_experts);

  ProgressLine progress(global.quiet);
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [start] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  options.progress = [&](int64_t done, int64_t total) {
    const double speed = static_cast<double>(done) / std::max(seconds(), 1e-3);
    progress.update(fmt::format("synth: {:5.1f} % of {:.2f} GB, {:.0f} MB/s, {:.0f} s left", 100.0 * done / total,
                                total / 1e9, speed / 1e6, (total - done) / speed));
  };
  const SynthResult result = write_synth_checkpoint(arguments.destination, options);
  progress.finish();
  fmt::print("{}: {} tensors, {:.2f} GB in {} file{}, {}, seed {}, {:.1f} s\n", arguments.destination,
             result.num_tensors, result.bytes / 1e9, result.num_files, result.num_files == 1 ? "" : "s",
             arguments.variant, arguments.seed, seconds());
}

}  // namespace

void register_synth(CLI::App& app, GlobalOptions& global) {
  auto arguments = std::make_shared<SynthArguments>();
  CLI::App* command =
      app.add_subcommand("synth", "write a random checkpoint of any configuration (for tests and benches)");
  command->add_option("DST", arguments->destination, "folder to write: new or empty")->required();
  command->add_option("--config", arguments->config_path, "config.json to follow");
  command->add_option("--shape", arguments->shape, "configuration of a known model")
      ->check(CLI::IsMember({"demo", "flash", "pro"}));
  command->add_option("--layers", arguments->num_layers, "number of layers (default: as configured)")
      ->check(CLI::Range(1, 1024));
  command->add_option("--experts", arguments->num_experts, "routed experts per layer (default: as configured)")
      ->check(CLI::Range(1, 65536));
  command->add_option("--variant", arguments->variant, "how weights are stored")
      ->check(CLI::IsMember({"bf16", "official", "modelopt", "compressed"}))
      ->capture_default_str();
  command->add_option("--seed", arguments->seed, "same seed, same model, in every variant")->capture_default_str();
  command->add_option("--shard-mb", arguments->shard_mb, "largest weight file in MiB")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--threads", arguments->num_threads, "threads (default: all CPUs)")->check(CLI::Range(1, 4096));
  command->callback([arguments, &global] { run_synth(*arguments, global); });
}

}  // namespace dsv4::app
