// Opening a folder; synchronising a session with a token prefix.
#include "engine/engine.h"

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "base/memory.h"

namespace dsv4 {

std::unique_ptr<Engine> Engine::open(const std::string& folder, const EngineOptions& options) {
  std::unique_ptr<Engine> engine(new Engine());
  engine->options_ = options;
  engine->isa_ = options.isa.value_or(best_cpu_isa());
  if (engine->isa_ > best_cpu_isa())
    throw_resource("instruction set {} asked for, this machine has {}", cpu_isa_name(engine->isa_),
                   cpu_isa_name(best_cpu_isa()));
  engine->pool_ = std::make_unique<ThreadPool>(options.num_threads, options.pin_threads);
  engine->checkpoint_ = std::make_shared<const Checkpoint>(open_checkpoint(folder));
  engine->tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::load(folder + "/tokenizer.json"));
  if (engine->tokenizer_->vocab_size() > engine->config().vocab_size)
    throw_bad_input("{}/tokenizer.json: vocabulary of {} ids, config.json says vocab_size {}", folder,
                    engine->tokenizer_->vocab_size(), engine->config().vocab_size);
  engine->model_ =
      std::make_unique<DeepseekV4>(engine->checkpoint_, options.precision, CpuContext{*engine->pool_, engine->isa_});
  if (engine->should_repack()) engine->model_->repack(options.repack_progress);
  return engine;
}

bool Engine::should_repack() const {
  if (options_.repack != Repack::kAuto) return options_.repack == Repack::kOn;
  const int64_t bytes = model_->repacked_bytes(), available = available_memory_bytes();
  log(LogLevel::kInfo, "repacked weights take {} MB, {} MB of memory are available", bytes >> 20, available >> 20);
  return bytes > 0 && bytes <= available / 2;
}

bool Engine::is_end_token(TokenId id) const {
  const auto& ends = config().eos_token_ids;
  return std::find(ends.begin(), ends.end(), id) != ends.end();
}

Session::Session(Engine& engine) : engine_(engine), cache_(engine.model().new_sequence(engine.options().max_chunk)) {}

bool Session::sync(std::span<const TokenId> tokens, const Progress& progress) {
  if (tokens.empty()) throw_bad_input("sync to no tokens: an empty prefix has no logits");
  engine_.model().check_tokens(tokens, 0);  // all of them, before anything is dropped or computed
  const size_t common = static_cast<size_t>(
      std::mismatch(tokens.begin(), tokens.end(), tokens_.begin(), tokens_.end()).first - tokens.begin());
  if (common < tokens_.size()) {
    if (mark_ && mark_->snapshot.num_tokens <= static_cast<int64_t>(common)) {
      cache_.restore(mark_->snapshot);
      logits_ = mark_->logits;
      tokens_.resize(static_cast<size_t>(mark_->snapshot.num_tokens));
    } else {
      clear();
    }
  }
  // Stopped between chunks exactly here: the tokens are in the cache, but their logits were never computed.
  if (tokens_.size() == tokens.size() && logits_.empty()) clear();
  return feed(tokens.subspan(tokens_.size()), progress);
}

void Session::append(TokenId token) { feed({&token, 1}, {}); }

bool Session::feed(std::span<const TokenId> tokens, const Progress& progress) {
  const size_t max_chunk = static_cast<size_t>(engine_.options().max_chunk);
  const int64_t total = static_cast<int64_t>(tokens.size());
  for (int64_t done = 0; !tokens.empty();) {
    if (progress && !progress(done, total)) return false;
    const auto chunk = tokens.subspan(0, std::min(max_chunk, tokens.size()));
    tokens = tokens.subspan(chunk.size());
    const SequenceInput input{&cache_, chunk, tokens.empty() ? WantLogits::kLast : WantLogits::kNone};
    engine_.model().forward({&input, 1}, logits_);
    tokens_.insert(tokens_.end(), chunk.begin(), chunk.end());
    done += static_cast<int64_t>(chunk.size());
  }
  return true;
}

void Session::mark() { mark_ = Mark{cache_.snapshot(), logits_}; }

void Session::clear() {
  cache_.clear();
  tokens_.clear();
  logits_.clear();
  mark_.reset();
}

}  // namespace dsv4
