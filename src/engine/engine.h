// Engine: a loaded model with its tokenizer. Session: one timeline of tokens with its cache.
//
// A session's central call is sync(tokens): make the cache hold exactly this prefix, doing the least work: extend it, or go
// back to the latest mark() inside the common prefix and extend from there, or start over. Then logits() are those after the
// last token. Tokens are processed in chunks of at most EngineOptions::max_chunk.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"
#include "model/deepseek_v4.h"
#include "ops/precision.h"
#include "ops/sampling/sampling.h"
#include "text/tokenizer.h"

namespace dsv4 {

// Weights in the layout of the vector kernels: a copy in memory beside the mapped file.
enum class Repack : uint8_t { kAuto, kOn, kOff };  // auto: if the copy takes at most half of the available memory

struct EngineOptions {
  Precision precision;
  int num_threads = 0;        // 0: one per available CPU
  bool pin_threads = false;   // workers keep to one CPU each (base/threads.h)
  std::optional<CpuIsa> isa;  // forced instruction set; unset: the best of this machine
  int64_t max_chunk = 256;    // tokens of one sequence per step
  Repack repack = Repack::kAuto;
  std::function<void(int64_t done, int64_t total)> repack_progress;
};

class Engine {
 public:
  // Throws dsv4::Error naming file, tensor, expected, found.
  static std::unique_ptr<Engine> open(const std::string& folder, const EngineOptions& options);

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const ModelConfig& config() const { return checkpoint_->config(); }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const EngineOptions& options() const { return options_; }
  CpuIsa isa() const { return isa_; }
  int num_threads() const { return pool_->num_threads(); }
  DeepseekV4& model() { return *model_; }
  bool is_end_token(TokenId id) const;

 private:
  Engine() = default;
  bool should_repack() const;
  EngineOptions options_;
  CpuIsa isa_ = CpuIsa::kReference;
  std::unique_ptr<ThreadPool> pool_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<DeepseekV4> model_;
};

class Session {
 public:
  explicit Session(Engine& engine);

  const std::vector<TokenId>& tokens() const { return tokens_; }
  // Called between chunks of a long prefill with (done, total); return false to stop there (sync then returns false).
  using Progress = std::function<bool(int64_t done, int64_t total)>;
  // Throws bad input, and changes nothing, for no tokens, an id outside the vocabulary, and more than max_position tokens.
  bool sync(std::span<const TokenId> tokens, const Progress& progress = {});
  // One more token: the decode step. Throws as sync does.
  void append(TokenId token);
  // Of the next token, after the last one: [vocab_size]. Valid until the next call.
  std::span<const float> logits() const { return logits_; }

  // Remembers this point, so that a later sync() with another continuation need not start over. One mark is kept.
  void mark();
  void clear();

 private:
  bool feed(std::span<const TokenId> tokens, const Progress& progress);
  Engine& engine_;
  SequenceCache cache_;
  std::vector<TokenId> tokens_;
  std::vector<float> logits_;
  struct Mark {
    SequenceCache::Snapshot snapshot;
    std::vector<float> logits;
  };
  std::optional<Mark> mark_;
};

}  // namespace dsv4
