// Generation: sample tokens from a session until an end token, a stop string, a length, or the caller says stop.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"

namespace dsv4 {

struct GenerateOptions {
  SamplingParams sampling;
  uint64_t seed = 0;
  int64_t max_tokens = 128;
  std::vector<std::string> stop;  // text before the first of them is kept
  bool mark_before_last = false;  // Session::mark() in front of the prompt's last token
};

enum class FinishReason { kEndToken, kStopString, kLength, kInterrupted };
std::string_view finish_reason_name(FinishReason reason);  // "stop", "stop", "length", "interrupted"

struct GenerateResult {
  std::vector<TokenId> ids;  // generated, an end token included
  std::string text;          // of the ids, whole UTF-8, without end token and stop string
  FinishReason finish_reason = FinishReason::kLength;
  int64_t prefill_tokens = 0;  // that were computed; a prefix already in the session is not counted
  double prefill_seconds = 0;
  double decode_seconds = 0;

  double prefill_tokens_per_second() const { return rate(static_cast<double>(prefill_tokens), prefill_seconds); }
  // The first token comes out of the prefill.
  double decode_tokens_per_second() const { return rate(static_cast<double>(ids.size()) - 1, decode_seconds); }

 private:
  static double rate(double count, double seconds) { return seconds > 0 && count > 0 ? count / seconds : 0; }
};

struct GenerateCallbacks {
  // Text that is certain to be part of the result, in order. May be empty.
  std::function<void(std::string_view text)> on_text;
  // Before each chunk of the prefill and each token: return false to stop and keep what is there.
  std::function<bool()> keep_going;
  std::function<void(int64_t done, int64_t total)> on_prefill;
};

// Throws bad input, as sync does, for a prompt the session cannot hold or that leaves no position to generate at.
// Afterwards the session holds prompt + ids, except that the last id is not yet fed.
GenerateResult generate(Engine& engine, Session& session, std::span<const TokenId> prompt,
                        const GenerateOptions& options, const GenerateCallbacks& callbacks = {});

}  // namespace dsv4
