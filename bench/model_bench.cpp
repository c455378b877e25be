// Prefill and decode of a whole model.
#include "bench/model_bench.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "checkpoint/synth.h"
#include "engine/engine.h"

namespace dsv4::bench {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int64_t peak_resident_bytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  return 0;
}

// A synthetic checkpoint that is removed again.
class TemporaryCheckpoint {
 public:
  TemporaryCheckpoint(const ModelBenchOptions& options, const std::function<void(const std::string&)>& progress)
      : folder_(std::filesystem::temp_directory_path() / fmt::format("dsv4_bench_{}", ::getpid())) {
    SynthOptions synth;
    synth.config = synth_shape_config(options.shape);
    resize_synth_config(synth.config, options.num_layers, options.num_experts);
    synth.variant = SynthVariant::kModelOpt;
    synth.num_threads = options.num_threads;
    synth.progress = [&](int64_t done, int64_t total) {
      progress(fmt::format("writing a synthetic checkpoint: {:.1f} / {:.1f} GB", static_cast<double>(done) / 1e9,
                           static_cast<double>(total) / 1e9));
    };
    write_synth_checkpoint(folder_, synth);
  }
  ~TemporaryCheckpoint() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  std::string folder() const { return folder_; }

 private:
  std::filesystem::path folder_;
};

}  // namespace

ModelBenchResult bench_model(const ModelBenchOptions& options,
                             const std::function<void(const std::string&)>& progress) {
  std::optional<TemporaryCheckpoint> temporary;
  if (options.folder.empty()) temporary.emplace(options, progress);
  ModelBenchResult result;
  const auto load_start = Clock::now();
  EngineOptions engine_options;
  engine_options.num_threads = options.num_threads;
  engine_options.pin_threads = options.pin_threads;
  engine_options.isa = options.isa;
  const auto engine = Engine::open(temporary ? temporary->folder() : options.folder, engine_options);
  result.load_seconds = seconds_since(load_start);

  // Any ids do: speed depends on the routing they cause, and these spread over the vocabulary.
  std::vector<TokenId> prompt;
  for (int64_t i = 0; i < options.prompt_tokens; ++i)
    prompt.push_back(static_cast<TokenId>((i * 2654435761ll + 17) % engine->config().vocab_size));
  std::vector<double> prefill, decode;
  Session session(*engine);
  for (int rep = 0; rep <= options.repetitions; ++rep) {  // the first one warms up
    progress(fmt::format("repetition {} / {}", rep, options.repetitions));
    session.clear();
    const auto prefill_start = Clock::now();
    session.sync(prompt);
    const double prefill_seconds = seconds_since(prefill_start);
    const auto decode_start = Clock::now();
    for (int64_t i = 0; i < options.decode_tokens; ++i) session.append(argmax(session.logits()));
    const double decode_seconds = seconds_since(decode_start);
    if (rep == 0) continue;
    prefill.push_back(static_cast<double>(options.prompt_tokens) / prefill_seconds);
    decode.push_back(static_cast<double>(options.decode_tokens) / decode_seconds);
  }
  result.prefill_tokens_per_second = median(prefill);
  result.decode_tokens_per_second = median(decode);
  result.bytes_per_token = engine->model().bytes_per_token();
  result.resident_bytes = peak_resident_bytes();
  return result;
}

}  // namespace dsv4::bench
