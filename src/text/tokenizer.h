// Byte-level BPE from tokenizer.json: added tokens on the raw text, the file's split patterns, merges, byte mapping.
// Spec section 8.1. No tensors, no model.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/token_id.h"

namespace dsv4 {

class Tokenizer {
 public:
  // Throws bad input naming file, key, expected and found.
  static Tokenizer load(const std::string& tokenizer_json_path);
  static Tokenizer parse(std::string_view json_text, const std::string& source);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  int64_t vocab_size() const;  // largest id + 1, added tokens included

  // Text may be any bytes; invalid UTF-8 is encoded byte by byte and decodes to the same bytes. No BOS is added.
  // parse_special = false: no added token is recognised, special or not; the text is ordinary text (untrusted content).
  std::vector<TokenId> encode(std::string_view text, bool parse_special = true) const;

  // Raw bytes of the tokens; not necessarily whole UTF-8 characters. Unknown ids throw.
  std::string decode(std::span<const TokenId> ids, bool skip_special = false) const;
  std::string_view token_bytes(TokenId id) const;
  bool is_special(TokenId id) const;
  std::optional<TokenId> token_id(std::string_view content) const;  // exact added or vocabulary token content

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Turns a stream of token bytes into whole UTF-8 characters: holds back an unfinished character until it is complete or
// proves invalid (then U+FFFD).
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  std::string finish();

 private:
  std::string pending_;
};

}  // namespace dsv4
