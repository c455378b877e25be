// Shared model flags.
#include "model_options.h"

#include <charconv>
#include <cstdint>
#include <sstream>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "checkpoint/safetensors.h"
#include "terminal.h"

namespace dsv4::app {

void add_model_options(CLI::App& command, ModelOptions& options) {
  command.add_option("-m,--model", options.folder, "checkpoint folder")->required();
  command
      .add_option("--backend", options.backend,
                  "auto or cpu: the CPU; cuda: refused (exit 3), the model forward has no GPU path yet")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
  command.add_option("--threads", options.num_threads, "CPU threads, 0: all this process may use")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command.add_flag("--pin", options.pin,
                   "each worker thread keeps to one CPU, one per core first (when the machine is yours alone)");
  auto* exact =
      command.add_flag("--exact", options.exact, "binary32 activations and caches, no simulated quantisation");
  command.add_option("--act", options.act, "activations of expert GEMMs: a16 (bf16) or a4 (NVFP4)")
      ->check(CLI::IsMember({"a16", "a4"}))
      ->capture_default_str()
      ->excludes(exact);
  command.add_option("--kv", options.kv, "cache rows: bf16, fp8 or nvfp4 (fp8 is faithful to official weights)")
      ->check(CLI::IsMember({"bf16", "fp8", "nvfp4"}))
      ->capture_default_str()
      ->excludes(exact);
  command.add_option("--index", options.index, "indexer keys: bf16, fp8 or fp4 (fp4 is faithful to official weights)")
      ->check(CLI::IsMember({"bf16", "fp8", "fp4"}))
      ->capture_default_str()
      ->excludes(exact);
  command.add_option("--isa", options.isa, "force an instruction set: reference, avx2, avx512, amx")
      ->check(CLI::IsMember({"reference", "avx2", "avx512", "amx"}));
  command
      .add_option("--repack", options.repack,
                  "weights in kernel layout: auto (if the copy takes at most half of the free memory), on, off")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command.add_option("--chunk", options.max_chunk, "most prompt tokens per step")
      ->check(CLI::Range(int64_t{1}, int64_t{8192}))
      ->capture_default_str();
}

std::unique_ptr<Engine> open_engine(const ModelOptions& options, const GlobalOptions& global) {
  if (options.backend == "cuda")
    throw_resource(
        "--backend cuda: the model forward runs on the CPU in this version (its GPU kernels are separate ops)");
  EngineOptions engine;
  if (options.exact) {
    engine.precision = Precision::make_exact();
  } else {
    engine.precision.act = options.act == "a4" ? ActFormat::kNvfp4 : ActFormat::kBf16;
    engine.precision.kv = options.kv == "fp8"     ? KvFormat::kFp8
                          : options.kv == "nvfp4" ? KvFormat::kNvfp4
                                                  : KvFormat::kBf16;
    engine.precision.index = options.index == "fp8"   ? IndexFormat::kFp8
                             : options.index == "fp4" ? IndexFormat::kFp4
                                                      : IndexFormat::kBf16;
  }
  engine.num_threads = options.num_threads;
  engine.pin_threads = options.pin;
  engine.max_chunk = options.max_chunk;
  engine.repack = options.repack == "on" ? Repack::kOn : options.repack == "off" ? Repack::kOff : Repack::kAuto;
  ProgressLine line(global.quiet);
  engine.repack_progress = [&line](int64_t done, int64_t total) {
    line.update(fmt::format("repacking weights {:.1f} / {:.1f} GB", static_cast<double>(done) / 1e9,
                            static_cast<double>(total) / 1e9));
  };
  if (!options.isa.empty()) engine.isa = cpu_isa_from_name(options.isa);
  return Engine::open(options.folder, engine);
}

namespace {

TokenId checked_id(int64_t id, const std::string& path, size_t index) {
  if (id < 0 || id > INT32_MAX) throw_bad_input("{}: token {} is {}, expected 0..{}", path, index, id, INT32_MAX);
  return static_cast<TokenId>(id);
}

std::vector<TokenId> read_token_tensor(const std::string& path) {
  const SafetensorsFile file(path);
  const TensorView& view = file.at("input_ids");
  if (view.shape.size() != 1 || (view.dtype != DType::kI64 && view.dtype != DType::kI32))
    throw_bad_input("{}: input_ids: expected I64 of shape [T], found {} {}", path, dtype_name(view.dtype),
                    to_string(view.shape));
  std::vector<TokenId> ids;
  for (int64_t i = 0; i < view.elements(); ++i)
    ids.push_back(checked_id(view.dtype == DType::kI64 ? view.as<int64_t>()[i] : view.as<int32_t>()[i], path,
                             static_cast<size_t>(i)));
  return ids;
}

}  // namespace

std::vector<TokenId> read_token_file(const std::string& path) {
  std::vector<TokenId> ids;
  if (path.ends_with(".safetensors")) {
    ids = read_token_tensor(path);
  } else {
    const std::string text = read_text_file(path, 64 << 20);
    if (text.find('[') != std::string::npos) {
      const Json json = parse_json(text, path);
      if (!json.is_array()) throw_bad_input("{}: expected a JSON array of token ids", path);
      for (const Json& item : json) {
        if (!item.is_number_integer())
          throw_bad_input("{}: token {}: expected an integer, found {}", path, ids.size(), item.dump());
        ids.push_back(checked_id(item.get<int64_t>(), path, ids.size()));
      }
    } else {
      std::istringstream stream(text);
      for (std::string word; stream >> word;) {
        int64_t id = 0;
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
        if (error != std::errc() || end != word.data() + word.size())
          throw_bad_input("{}: token {}: expected an integer, found \"{}\"", path, ids.size(), word);
        ids.push_back(checked_id(id, path, ids.size()));
      }
    }
  }
  if (ids.empty()) throw_bad_input("{}: no token ids", path);
  return ids;
}

}  // namespace dsv4::app
