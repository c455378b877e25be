// tokenizer.json as plain data, everything in it checked. What this engine does not implement is refused here.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/bpe.h"
#include "text/token_id.h"

namespace dsv4 {

// Bounds every table that is indexed by id. DeepSeek-V4 has 129280.
inline constexpr TokenId kMaxVocabSize = 1 << 22;

struct AddedToken {
  TokenId id;
  std::string content;  // 1..AddedTokenTrie::kMaxContentBytes bytes
  bool special;
  bool normalized;  // matched in a second pass, on what the other added tokens left over
};

struct TokenizerJson {
  std::vector<std::pair<std::string, TokenId>> vocab;  // content as in the file; contents and ids distinct
  std::vector<BpeMerge> merges;                        // by rank; pairs distinct
  std::vector<AddedToken> added_tokens;     // contents and ids distinct; one that vocab has too has the same id there
  std::vector<std::string> split_patterns;  // in order of application
};

// source: what to call the text in errors.
TokenizerJson parse_tokenizer_json(std::string_view text, const std::string& source);

}  // namespace dsv4
