// include/dsv4/engine.h on top of Engine and Session.
#include "dsv4/engine.h"

#include "base/check.h"
#include "engine/engine.h"
#include "engine/generate.h"

namespace dsv4 {
namespace {

template <class Value>
Value choose(const std::string& name, const std::string& given,
             std::initializer_list<std::pair<const char*, Value>> choices) {
  std::string known;
  for (const auto& [text, value] : choices) {
    if (given == text) return value;
    known += known.empty() ? text : std::string(", ") + text;
  }
  throw_usage("{} = \"{}\", expected one of {}", name, given, known);
}

EngineOptions to_options(const ModelSettings& settings) {
  EngineOptions options;
  options.num_threads = settings.num_threads;
  options.precision.act =
      choose<ActFormat>("act", settings.act, {{"a16", ActFormat::kBf16}, {"a4", ActFormat::kNvfp4}});
  options.precision.kv = choose<KvFormat>(
      "kv", settings.kv, {{"bf16", KvFormat::kBf16}, {"fp8", KvFormat::kFp8}, {"nvfp4", KvFormat::kNvfp4}});
  options.precision.index = choose<IndexFormat>(
      "index", settings.index, {{"bf16", IndexFormat::kBf16}, {"fp8", IndexFormat::kFp8}, {"fp4", IndexFormat::kFp4}});
  if (settings.exact) options.precision = Precision::make_exact();
  return options;
}

}  // namespace

struct LanguageModel::Impl {
  std::unique_ptr<Engine> engine;
};
struct Timeline::Impl {
  Engine& engine;
  Session session;
};

LanguageModel::LanguageModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LanguageModel::~LanguageModel() = default;
LanguageModel::LanguageModel(LanguageModel&&) noexcept = default;

LanguageModel LanguageModel::open(const std::string& folder, const ModelSettings& settings) {
  return LanguageModel(std::make_unique<Impl>(Impl{Engine::open(folder, to_options(settings))}));
}
int64_t LanguageModel::vocab_size() const { return impl_->engine->config().vocab_size; }
int32_t LanguageModel::bos_token_id() const { return static_cast<int32_t>(impl_->engine->config().bos_token_id); }
std::vector<int32_t> LanguageModel::encode(std::string_view text, bool parse_special) const {
  return impl_->engine->tokenizer().encode(text, parse_special);
}
std::string LanguageModel::decode(std::span<const int32_t> ids) const { return impl_->engine->tokenizer().decode(ids); }

Timeline::Timeline(LanguageModel& model)
    : impl_(std::make_unique<Impl>(Impl{*model.impl_->engine, Session(*model.impl_->engine)})) {}
Timeline::~Timeline() = default;
Timeline::Timeline(Timeline&&) noexcept = default;

void Timeline::sync(std::span<const int32_t> ids) { impl_->session.sync(ids); }
void Timeline::append(int32_t id) { impl_->session.append(id); }
std::span<const float> Timeline::logits() const { return impl_->session.logits(); }

Completion Timeline::generate(std::string_view prompt, const TextSettings& settings) {
  std::vector<TokenId> ids{static_cast<TokenId>(impl_->engine.config().bos_token_id)};
  const auto encoded = impl_->engine.tokenizer().encode(prompt, /*parse_special=*/false);
  ids.insert(ids.end(), encoded.begin(), encoded.end());

  GenerateOptions options;
  options.sampling = {settings.temperature, settings.top_k, settings.top_p, settings.min_p};
  options.seed = settings.seed;
  options.max_tokens = settings.max_tokens;
  options.stop = settings.stop;
  bool go_on = true;
  GenerateCallbacks callbacks;
  callbacks.keep_going = [&] { return go_on; };
  if (settings.on_text) callbacks.on_text = [&](std::string_view text) { go_on = go_on && settings.on_text(text); };
  const GenerateResult result = dsv4::generate(impl_->engine, impl_->session, ids, options, callbacks);
  return {result.ids, result.text, std::string(finish_reason_name(result.finish_reason))};
}

}  // namespace dsv4
