// dsv4 eval ppl, dsv4 eval logits.
#include <cstdio>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "commands.h"
#include "engine/eval.h"
#include "model_options.h"
#include "terminal.h"

namespace dsv4::app {
namespace {

struct PplOptions {
  ModelOptions model;
  std::string text_path;
  int64_t ctx = 1024;
  int64_t windows = 0;
  bool json = false;
};

struct LogitsOptions {
  ModelOptions model;
  std::string tokens_path, out_path;
  bool layers = false, margins = false;
};

std::function<bool(int64_t, int64_t)> progress_callback(ProgressLine& line) {
  return [&line](int64_t done, int64_t total) {
    line.update(fmt::format("{} / {} tokens", done, total));
    return !interrupted();
  };
}

void run_ppl(const PplOptions& options, GlobalOptions& global) {
  install_interrupt_handler();
  const auto engine = open_engine(options.model, global);
  std::vector<TokenId> tokens{static_cast<TokenId>(engine->config().bos_token_id)};
  const auto text_tokens =
      engine->tokenizer().encode(read_text_file(options.text_path, 1ull << 30), /*parse_special=*/false);
  tokens.insert(tokens.end(), text_tokens.begin(), text_tokens.end());
  if (std::ssize(tokens) <= options.ctx)
    throw_bad_input("{}: text of {} tokens (BOS included) has no complete window of {} and its next token",
                    options.text_path, tokens.size(), options.ctx);
  ProgressLine line(global.quiet);
  const PerplexityResult result =
      evaluate_perplexity(*engine, tokens, options.ctx, options.windows, progress_callback(line));
  line.finish();
  if (interrupted()) global.exit_code = 130;
  if (result.num_scored == 0) return;
  if (options.json) {
    std::printf("%s\n", Json{{"perplexity", result.perplexity()},
                             {"nats_per_token", result.nats / static_cast<double>(result.num_scored)},
                             {"nats_per_byte", result.nats_per_byte()},
                             {"ctx", options.ctx},
                             {"windows", result.num_windows},
                             {"tokens", result.num_scored},
                             {"bytes", result.num_bytes},
                             {"tokens_per_second", static_cast<double>(result.num_scored) / result.seconds}}
                            .dump(2)
                            .c_str());
  } else {
    std::printf("perplexity %.4f per token, %.5f nats per byte (%lld windows of %lld, %lld tokens)\n",
                result.perplexity(), result.nats_per_byte(), static_cast<long long>(result.num_windows),
                static_cast<long long>(options.ctx), static_cast<long long>(result.num_scored));
  }
  if (!global.quiet)
    std::fprintf(stderr, "%.1f s, %.0f tokens/s\n", result.seconds,
                 static_cast<double>(result.num_scored) / result.seconds);
}

void run_logits(const LogitsOptions& options, GlobalOptions& global) {
  install_interrupt_handler();
  const std::vector<TokenId> tokens = read_token_file(options.tokens_path);
  const auto engine = open_engine(options.model, global);
  ProgressLine line(global.quiet);
  const LogitsResult result = evaluate_logits(*engine, tokens, options.layers, progress_callback(line));
  line.finish();
  if (interrupted()) {
    global.exit_code = 130;
    return;  // nothing half-done under the output's name
  }
  const ModelConfig& config = engine->config();
  const auto bytes = [](const std::vector<float>& values) { return reinterpret_cast<const std::byte*>(values.data()); };
  std::vector<std::pair<std::string, TensorView>> out{
      {"logits", {DType::kF32, {result.num_tokens, config.vocab_size}, bytes(result.logits)}}};
  if (options.layers)
    out.push_back({"layer_streams",
                   {DType::kF32,
                    {config.num_layers, result.num_tokens, config.num_hc, config.hidden},
                    bytes(result.layer_streams)}});
  if (options.margins)
    out.push_back({"decision_margin", {DType::kF32, {result.num_tokens}, bytes(result.decision_margin)}});
  write_safetensors(options.out_path, out);
}

}  // namespace

void register_eval(CLI::App& app, GlobalOptions& global) {
  auto* eval = app.add_subcommand("eval", "measure a model: perplexity, logits");
  eval->require_subcommand(1);

  auto ppl_options = std::make_shared<PplOptions>();
  auto* ppl = eval->add_subcommand("ppl", "perplexity of BOS + text over cold windows");
  add_model_options(*ppl, ppl_options->model);
  ppl->add_option("--text", ppl_options->text_path, "UTF-8 text file")->required();
  ppl->add_option("--ctx", ppl_options->ctx, "tokens per window")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  ppl->add_option("--windows", ppl_options->windows, "number of windows, 0: all complete ones")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  ppl->add_flag("--json", ppl_options->json, "one JSON object on stdout");
  ppl->callback([ppl_options, &global] { run_ppl(*ppl_options, global); });

  auto logits_options = std::make_shared<LogitsOptions>();
  auto* logits = eval->add_subcommand("logits", "logits after every token, as safetensors");
  add_model_options(*logits, logits_options->model);
  logits->add_option("--tokens", logits_options->tokens_path, "safetensors with input_ids i64 [T]")->required();
  logits->add_option("--out", logits_options->out_path, "safetensors to write: logits f32 [T, vocab]")->required();
  logits->add_flag("--layers", logits_options->layers, "also layer_streams f32 [layers, T, streams, hidden]");
  logits->add_flag("--margins", logits_options->margins,
                   "also decision_margin f32 [T]: smallest gap at a top-k border (experts, indexer) in any layer");
  logits->callback([logits_options, &global] { run_logits(*logits_options, global); });
}

}  // namespace dsv4::app
