// A tokenizer.json for tests: the byte alphabet, a few merges, DeepSeek's special tokens and split patterns.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "text/byte_alphabet.h"
#include "text/tokenizer.h"

namespace dsv4::test {

inline const std::string kBos = "<｜begin▁of▁sentence｜>";
inline const std::string kEos = "<｜end▁of▁sentence｜>";
inline const std::string kUser = "<｜User｜>";
inline const std::string kAssistant = "<｜Assistant｜>";
inline const std::string kDsml = "｜DSML｜";

inline Json added_token(int id, const std::string& content, bool special = true, bool normalized = false) {
  return {{"id", id},        {"content", content},       {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", normalized}, {"special", special}};
}

// Ids: specials first, then bytes in byte order, then products of merges in order (the alphabet's "Ġ" is a space).
inline Json tiny_tokenizer_json(const std::vector<std::pair<std::string, std::string>>& merges = {
                                    {"h", "e"}, {"t", "he"}, {"Ġ", "the"}, {"a", "b"}}) {
  Json json;
  json["version"] = "1.0";
  json["truncation"] = nullptr;
  json["padding"] = nullptr;
  json["normalizer"] = nullptr;
  int next_id = 0;
  Json vocab = Json::object();
  json["added_tokens"] = Json::array();
  for (const std::string& content :
       {kBos, kEos, kUser, kAssistant, std::string("<think>"), std::string("</think>"), kDsml,
        std::string("<｜latest_reminder｜>"), std::string("<｜action｜>"), std::string("<｜title｜>")})
    json["added_tokens"].push_back(added_token(next_id++, content));
  const ByteAlphabet alphabet;
  for (int byte = 0; byte < 256; ++byte) vocab[alphabet.character(static_cast<uint8_t>(byte))] = next_id++;
  Json merge_list = Json::array();
  for (const auto& [left, right] : merges) {
    if (!vocab.contains(left + right)) vocab[left + right] = next_id++;
    merge_list.push_back({left, right});
  }
  const auto split = [](const std::string& regex) {
    return Json{{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}};
  };
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  json["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {split("\\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(
            R"([!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"),
        byte_level}}};
  json["post_processor"] = nullptr;
  json["decoder"] = byte_level;
  json["model"] = {{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"ignore_merges", false},
                   {"vocab", vocab},
                   {"merges", merge_list}};
  return json;
}

inline Tokenizer parse_tokenizer(const Json& json) { return Tokenizer::parse(json.dump(), "tiny.json"); }
inline Tokenizer tiny_tokenizer() { return parse_tokenizer(tiny_tokenizer_json()); }

// Each token's bytes, for readable expectations.
inline std::vector<std::string> pieces(const Tokenizer& tokenizer, const std::vector<TokenId>& ids) {
  std::vector<std::string> out;
  for (const TokenId id : ids) out.emplace_back(tokenizer.token_bytes(id));
  return out;
}

}  // namespace dsv4::test
