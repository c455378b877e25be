// dsv4 generate: one prompt, one continuation.
#include <cstdio>
#include <iostream>
#include <iterator>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "commands.h"
#include "model_options.h"
#include "sampling_options.h"
#include "terminal.h"

namespace dsv4::app {
namespace {

struct Options {
  ModelOptions model;
  SamplingOptions sampling;
  std::string prompt, prompt_path, tokens_path;
  bool json = false;
};

std::string prompt_text(const Options& options) {
  if (!options.prompt_path.empty()) return read_text_file(options.prompt_path, 256 << 20);
  if (options.prompt == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  return options.prompt;
}

// The prompt is the user's own: special tokens in it are honoured. BOS goes in front unless it is there already.
std::vector<TokenId> prompt_ids(const Options& options, const Engine& engine) {
  if (!options.tokens_path.empty()) return read_token_file(options.tokens_path);
  const TokenId bos = static_cast<TokenId>(engine.config().bos_token_id);
  std::vector<TokenId> ids = engine.tokenizer().encode(prompt_text(options));
  if (ids.empty() || ids.front() != bos) ids.insert(ids.begin(), bos);
  return ids;
}

void print_json(const std::vector<TokenId>& prompt, const GenerateResult& result, double bytes_per_token) {
  const Json object{{"prompt_ids", prompt},
                    {"ids", result.ids},
                    {"text", result.text},
                    {"finish_reason", finish_reason_name(result.finish_reason)},
                    {"prefill_tokens", result.prefill_tokens},
                    {"prefill_tokens_per_second", result.prefill_tokens_per_second()},
                    {"decode_tokens_per_second", result.decode_tokens_per_second()},
                    {"bytes_read_per_token", bytes_per_token}};
  std::printf("%s\n", object.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

void run(const Options& options, GlobalOptions& global) {
  install_interrupt_handler();
  const auto engine = open_engine(options.model, global);
  const std::vector<TokenId> prompt = prompt_ids(options, *engine);
  const GenerateOptions generate_options =
      to_generate_options(options.sampling, engine->checkpoint().generation_defaults());
  Session session(*engine);
  ProgressLine line(global.quiet);
  GenerateCallbacks callbacks;
  callbacks.keep_going = [] { return !interrupted(); };
  callbacks.on_prefill = [&](int64_t done, int64_t total) { line.update(fmt::format("prefill {} / {}", done, total)); };
  if (!options.json)
    callbacks.on_text = [&](std::string_view text) {
      line.finish();
      std::fwrite(text.data(), 1, text.size(), stdout);
      std::fflush(stdout);
    };
  const GenerateResult result = generate(*engine, session, prompt, generate_options, callbacks);
  line.finish();
  const double bytes_per_token = engine->model().bytes_per_token();
  options.json ? print_json(prompt, result, bytes_per_token) : static_cast<void>(std::putchar('\n'));
  if (!global.quiet) print_statistics(result, bytes_per_token);
  if (result.finish_reason == FinishReason::kInterrupted) global.exit_code = 130;
}

}  // namespace

void register_generate(CLI::App& app, GlobalOptions& global) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("generate", "continue a prompt");
  add_model_options(*command, options->model);
  auto* source = command->add_option_group("prompt");
  source->add_option("-p,--prompt", options->prompt, "prompt text, - for standard input");
  source->add_option("-f,--file", options->prompt_path, "file with the prompt text");
  source->add_option("--tokens-in", options->tokens_path,
                     "file with token ids: safetensors (input_ids), JSON array or plain numbers");
  source->require_option(1);
  add_sampling_options(*command, options->sampling);
  command->add_flag("--json", options->json, "one JSON object on stdout when done");
  command->callback([options, &global] { run(*options, global); });
}

}  // namespace dsv4::app
