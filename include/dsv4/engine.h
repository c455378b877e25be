// The C++ API of dsv4: open a DeepSeek-V4 checkpoint folder, hold timelines of tokens, generate text.
//
//   dsv4::LanguageModel model = dsv4::LanguageModel::open("models/demo");
//   dsv4::Timeline timeline(model);
//   std::string text = timeline.generate("It was late", {.max_tokens = 50}).text;
//
// Errors are std::runtime_error (or std::bad_alloc): those of open name file, tensor, expected and found, those of the other calls
// what was given and what is taken. A moved-from object may only be destroyed. A model may be shared by several timelines, but calls
// on one model must not overlap in time. Nothing prints; nothing exits.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#if defined(__GNUC__)
#define DSV4_API __attribute__((visibility("default")))
#else
#define DSV4_API
#endif

namespace dsv4 {

struct ModelSettings {
  bool exact = false;          // binary32 activations and caches, whatever the next three say
  std::string act = "a16";     // a16, a4
  std::string kv = "bf16";     // bf16, fp8, nvfp4
  std::string index = "bf16";  // bf16, fp8, fp4
  int num_threads = 0;         // 0: all CPUs of this process
};

struct TextSettings {
  int64_t max_tokens = 128;
  float temperature = 0;  // 0: greedy
  float top_p = 1;
  int top_k = 0;  // 0: all
  float min_p = 0;
  uint64_t seed = 0;
  std::vector<std::string> stop;
  std::function<bool(std::string_view text)> on_text;  // new text; return false to stop
};

struct Completion {
  std::vector<int32_t> ids;  // an end token included
  std::string text;
  std::string finish_reason;  // "stop", "length", "interrupted"
};

class DSV4_API LanguageModel {
 public:
  // Throws for a folder without a usable checkpoint and tokenizer, and for an act, kv or index that is none of those listed above,
  // also when exact.
  static LanguageModel open(const std::string& folder, const ModelSettings& settings = {});
  ~LanguageModel();
  LanguageModel(LanguageModel&&) noexcept;

  int64_t vocab_size() const;
  int32_t bos_token_id() const;
  // No BOS is added. parse_special: special tokens written in the text become their ids.
  std::vector<int32_t> encode(std::string_view text, bool parse_special = false) const;
  // Throws for an id that is not in the tokenizer.
  std::string decode(std::span<const int32_t> ids) const;

 private:
  friend class Timeline;
  struct Impl;
  explicit LanguageModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class DSV4_API Timeline {
 public:
  explicit Timeline(LanguageModel& model);  // the model must outlive it
  ~Timeline();
  Timeline(Timeline&&) noexcept;

  // Makes the cache hold exactly these ids, computing only what is new. Throws, and changes nothing, for no ids, an id outside
  // 0 .. vocab_size() - 1, and more ids than the model has positions (max_position_embeddings).
  void sync(std::span<const int32_t> ids);
  // One more id. Throws as sync does.
  void append(int32_t id);
  // Logits of the next token: [vocab_size], valid until the next call; empty before the first sync, append or generate.
  std::span<const float> logits() const;

  // BOS + prompt, then sampled text, until an end token, a stop string, max_tokens, or the model's last position. Throws, and
  // changes nothing, for a prompt that fills all positions; throws half-way for a sampled id that the tokenizer lacks. An exception
  // from on_text passes through.
  Completion generate(std::string_view prompt, const TextSettings& settings = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv4
