// The sampling loop.
#include "engine/generate.h"

#include <chrono>

#include "base/check.h"
#include "text/stop_strings.h"

namespace dsv4 {
namespace {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Token bytes -> whole characters -> text that no stop string can take back.
class TextOutput {
 public:
  TextOutput(std::vector<std::string> stop, const GenerateCallbacks& callbacks, std::string& text)
      : stop_(std::move(stop)), callbacks_(callbacks), text_(text) {}

  void push(std::string_view bytes) { emit(stop_.push(characters_.push(bytes))); }
  void finish() {
    emit(stop_.push(characters_.finish()));
    emit(stop_.finish());
  }
  bool stopped() const { return stop_.matched().has_value(); }

 private:
  void emit(const std::string& piece) {
    if (piece.empty()) return;
    text_ += piece;
    if (callbacks_.on_text) callbacks_.on_text(piece);
  }
  Utf8Stream characters_;
  StopStrings stop_;
  const GenerateCallbacks& callbacks_;
  std::string& text_;
};

}  // namespace

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEndToken:
    case FinishReason::kStopString:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kInterrupted:
      return "interrupted";
  }
  return "";
}

GenerateResult generate(Engine& engine, Session& session, std::span<const TokenId> prompt,
                        const GenerateOptions& options, const GenerateCallbacks& callbacks) {
  const auto keep_going = [&] { return !callbacks.keep_going || callbacks.keep_going(); };
  GenerateResult result;
  TextOutput output(options.stop, callbacks, result.text);
  SamplingRng rng(options.seed);
  const int64_t room = engine.config().max_position - static_cast<int64_t>(prompt.size());
  if (room < 1)
    throw_bad_input("prompt of {} tokens, the model's max_position_embeddings is {}", prompt.size(),
                    engine.config().max_position);

  engine.model().check_tokens(prompt, 0);  // whole, before a part of it is fed

  const Stopwatch prefill;
  const auto feed = [&](std::span<const TokenId> tokens) {
    const int64_t before = result.prefill_tokens;
    return session.sync(tokens, [&](int64_t done, int64_t total) {
      if (callbacks.on_prefill) callbacks.on_prefill(before + done, before + total);
      const bool go_on = keep_going();
      result.prefill_tokens = before + (go_on ? total : done);
      return go_on;
    });
  };
  bool complete = true;
  if (options.mark_before_last && prompt.size() > 1) {
    complete = feed(prompt.first(prompt.size() - 1));
    if (complete) session.mark();
  }
  complete = complete && feed(prompt);
  result.prefill_seconds = prefill.seconds();
  if (!complete) {
    result.finish_reason = FinishReason::kInterrupted;
    return result;
  }

  const Stopwatch decode;
  const int64_t limit = std::min(options.max_tokens, room);
  while (static_cast<int64_t>(result.ids.size()) < limit) {
    if (!result.ids.empty()) {
      if (!keep_going()) {
        result.finish_reason = FinishReason::kInterrupted;
        break;
      }
      session.append(result.ids.back());
    }
    const TokenId id = sample(session.logits(), options.sampling, rng);
    result.ids.push_back(id);
    if (engine.is_end_token(id)) {
      result.finish_reason = FinishReason::kEndToken;
      break;
    }
    output.push(engine.tokenizer().token_bytes(id));
    if (output.stopped()) {
      result.finish_reason = FinishReason::kStopString;
      break;
    }
  }
  output.finish();
  result.decode_seconds = decode.seconds();
  return result;
}

}  // namespace dsv4
