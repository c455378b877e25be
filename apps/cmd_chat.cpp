// dsv4 chat: a conversation on the terminal. The cache is kept from turn to turn.
#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "base/check.h"
#include "commands.h"
#include "model_options.h"
#include "sampling_options.h"
#include "terminal.h"
#include "text/chat_encoding.h"
#include "text/chat_texts.h"
#include "text/special_tokens.h"

namespace dsv4::app {
namespace {

struct Options {
  ModelOptions model;
  SamplingOptions sampling;
  std::string system;
  bool think = false;
  std::string effort;
};

constexpr const char* kHelp =
    "/reset        forget the conversation\n"
    "/think on|off reason before answering\n"
    "/system TEXT  set the system message and reset\n"
    "/stats        speed of the last answer\n"
    "/help         this list\n"
    "/quit         leave (also end of input)\n"
    "Ctrl-C stops an answer and keeps what is there.\n";

class Chat {
 public:
  Chat(Engine& engine, const Options& options, bool quiet)
      : engine_(engine),
        session_(engine),
        texts_(ChatTexts::load(engine.checkpoint().folder())),
        generate_options_(to_generate_options(options.sampling, engine.checkpoint().generation_defaults())),
        system_(options.system),
        quiet_(quiet),
        styled_(::isatty(STDOUT_FILENO)) {
    chat_options_.mode = options.think ? ThinkingMode::kThinking : ThinkingMode::kChat;
    chat_options_.reasoning_effort = options.effort;
    // The next turn replaces the prompt's last token (<think> becomes </think> once the reasoning is dropped): the state in front
    // of it is what that turn goes on from.
    generate_options_.mark_before_last = true;
    reset();
  }

  // Returns false to leave.
  bool handle_line(const std::string& line) {
    if (line.empty()) return true;
    if (line[0] != '/') {
      answer(line);
      return true;
    }
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space), argument = space == std::string::npos ? "" : line.substr(space + 1);
    if (name == "/quit" || name == "/exit") return false;
    if (name == "/reset") {
      reset();
    } else if (name == "/think" && (argument == "on" || argument == "off")) {
      chat_options_.mode = argument == "on" ? ThinkingMode::kThinking : ThinkingMode::kChat;
    } else if (name == "/system") {
      system_ = argument;
      reset();
    } else if (name == "/stats") {
      print_statistics(last_, engine_.model().bytes_per_token());
    } else {
      std::fputs(kHelp, stderr);
    }
    return true;
  }

 private:
  void reset() {
    messages_.clear();
    session_.clear();
    if (!system_.empty()) messages_.push_back({.role = Role::kSystem, .content = system_});
  }

  void answer(const std::string& text) {
    messages_.push_back({.role = Role::kUser, .content = text});
    const auto prompt = encode_chat(messages_, chat_options_, texts_).encode(engine_.tokenizer());
    ProgressLine line(quiet_);
    GenerateCallbacks callbacks;
    callbacks.keep_going = [] { return !interrupted(); };
    callbacks.on_prefill = [&](int64_t done, int64_t total) {
      line.update(fmt::format("prefill {} / {}", done, total));
    };
    callbacks.on_text = [&](std::string_view piece) {
      line.finish();
      show(piece);
    };
    shown_reasoning_ = chat_options_.mode != ThinkingMode::kThinking;
    if (!shown_reasoning_ && styled_) std::fputs("\x1b[2m", stdout);
    last_ = generate(engine_, session_, prompt, generate_options_, callbacks);
    line.finish();
    std::fputs(styled_ ? "\x1b[0m\n" : "\n", stdout);
    std::fflush(stdout);
    ++generate_options_.seed;  // another turn, other draws; still reproducible
    messages_.push_back(assistant_message(last_.text));
    clear_interrupt();
  }

  void show(std::string_view piece) {
    std::string text(piece);
    const size_t end = shown_reasoning_ ? std::string::npos : text.find(kEndThinkToken);
    if (end != std::string::npos) {
      shown_reasoning_ = true;
      text.replace(end, kEndThinkToken.size(), styled_ ? "\x1b[0m\n" : "\n");
    }
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }

  Message assistant_message(const std::string& text) const {
    Message message{.role = Role::kAssistant};
    if (chat_options_.mode == ThinkingMode::kChat) {
      message.content = text;
    } else {
      const size_t end = text.find(kEndThinkToken);
      message.reasoning = text.substr(0, end);
      if (end != std::string::npos) message.content = text.substr(end + kEndThinkToken.size());
    }
    return message;
  }

  Engine& engine_;
  Session session_;
  ChatTexts texts_;
  ChatOptions chat_options_;
  GenerateOptions generate_options_;
  std::string system_;
  std::vector<Message> messages_;
  GenerateResult last_;
  bool quiet_;
  bool styled_;
  bool shown_reasoning_ = true;
};

void run(const Options& options, GlobalOptions& global) {
  install_interrupt_handler();
  const auto engine = open_engine(options.model, global);
  Chat chat(*engine, options, global.quiet);
  const bool terminal = ::isatty(STDIN_FILENO);
  if (terminal && !global.quiet) std::fputs("Type a message; /help lists the commands.\n", stderr);
  std::string line;
  for (;;) {
    if (terminal) std::fputs("> ", stderr);
    if (!std::getline(std::cin, line)) break;
    if (!chat.handle_line(line)) break;
  }
  if (interrupted()) global.exit_code = 130;
}

}  // namespace

void register_chat(CLI::App& app, GlobalOptions& global) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("chat", "talk to the model on the terminal");
  add_model_options(*command, options->model);
  add_sampling_options(*command, options->sampling);
  command->add_option("--system", options->system, "system message");
  command->add_flag("--think", options->think, "reason before answering");
  command->add_option("--effort", options->effort,
                      "reasoning effort, as the checkpoint's encoding/ names it (needs --think)");
  command->callback([options, &global] { run(*options, global); });
}

}  // namespace dsv4::app
