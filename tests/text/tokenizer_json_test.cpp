// Hostile and unsupported tokenizer.json files: every one ends in an error that names the key.
#include <gtest/gtest.h>

#include "expect_error.h"
#include "tiny_tokenizer.h"

namespace dsv4::test {
namespace {

// The tiny file with the value at a JSON pointer replaced.
Json with(const char* pointer, const Json& value) {
  Json json = tiny_tokenizer_json();
  json[Json::json_pointer(pointer)] = value;
  return json;
}
Json without(const char* parent, const char* key) {
  Json json = tiny_tokenizer_json();
  json[Json::json_pointer(parent)].erase(key);
  return json;
}

TEST(TokenizerJson, UnsupportedKindsNameKeyExpectedAndFound) {
  const struct {
    const char* pointer;
    Json value;
    const char* key;
    const char* expected;
  } cases[] = {
      {"/version", "2.0", "version", "\"1.0\""},
      {"/model/type", "Unigram", "model.type", "\"BPE\""},
      {"/model/dropout", 0.1, "model.dropout", "null"},
      {"/model/unk_token", "<unk>", "model.unk_token", "null"},
      {"/model/continuing_subword_prefix", "##", "model.continuing_subword_prefix", "null"},
      {"/model/end_of_word_suffix", "</w>", "model.end_of_word_suffix", "null"},
      {"/model/byte_fallback", true, "model.byte_fallback", "false"},
      {"/model/ignore_merges", true, "model.ignore_merges", "false"},
      {"/normalizer", {{"type", "NFC"}}, "normalizer", "null or an empty Sequence"},
      {"/pre_tokenizer/type", "Whitespace", "pre_tokenizer.type", "\"Sequence\""},
      {"/pre_tokenizer/pretokenizers/0/type", "Digits", "pre_tokenizer.pretokenizers[0].type", "\"Split\""},
      {"/pre_tokenizer/pretokenizers/1/behavior", "Removed", "pre_tokenizer.pretokenizers[1].behavior", "\"Isolated\""},
      {"/pre_tokenizer/pretokenizers/1/invert", true, "pre_tokenizer.pretokenizers[1].invert", "false"},
      {"/pre_tokenizer/pretokenizers/1/pattern", {{"String", " "}}, "pre_tokenizer.pretokenizers[1].pattern", "Regex"},
      {"/pre_tokenizer/pretokenizers/1/pattern/Regex", "\\w", "pretokenizers[1].pattern.Regex", "\\w"},
      {"/pre_tokenizer/pretokenizers/3/type", "Split", "pre_tokenizer.pretokenizers[3].type", "\"ByteLevel\""},
      {"/pre_tokenizer/pretokenizers/3/add_prefix_space", true, "pretokenizers[3].add_prefix_space", "false"},
      {"/pre_tokenizer/pretokenizers/3/use_regex", true, "pretokenizers[3].use_regex", "false"},
      {"/decoder/type", "WordPiece", "decoder.type", "\"ByteLevel\""},
      {"/added_tokens/0/lstrip", true, "added_tokens[0].lstrip", "false"},
      {"/added_tokens/0/rstrip", true, "added_tokens[0].rstrip", "false"},
      {"/added_tokens/0/single_word", true, "added_tokens[0].single_word", "false"},
  };
  for (const auto& c : cases)
    EXPECT_BAD_INPUT(parse_tokenizer(with(c.pointer, c.value)), "tiny.json", c.key, c.expected) << c.pointer;
}

TEST(TokenizerJson, WrongTypesAndMissingKeysNameTheKey) {
  const Json wrong_values[] = {Json(nullptr),          Json(3),       Json("x"), Json(true), Json(1.5),
                               Json::array({1, 2, 3}), Json{{"a", 1}}};
  for (const char* pointer :
       {"/version", "/pre_tokenizer", "/pre_tokenizer/pretokenizers", "/pre_tokenizer/pretokenizers/0", "/decoder",
        "/pre_tokenizer/pretokenizers/0/pattern/Regex", "/model", "/model/vocab", "/model/merges", "/added_tokens/0",
        "/added_tokens/0/id", "/added_tokens/0/special", "/added_tokens/0/normalized"}) {
    for (const Json& value : wrong_values) {
      // The few values that happen to be valid where they land.
      const std::string_view at = pointer;
      if (at.ends_with("Regex") && value == "x") continue;
      if (at.ends_with("/id") && value == 3) continue;
      if ((at.ends_with("special") || at.ends_with("normalized")) && value.is_boolean()) continue;
      EXPECT_BAD_INPUT(parse_tokenizer(with(pointer, value)), "tiny.json") << pointer << " = " << value;
    }
  }
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens", 7)), "added_tokens", "an array");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/0/content", 7)), "added_tokens[0].content", "a string");
  EXPECT_BAD_INPUT(parse_tokenizer(without("", "model")), "model", "missing");
  EXPECT_BAD_INPUT(parse_tokenizer(without("", "decoder")), "decoder", "missing");
  EXPECT_BAD_INPUT(parse_tokenizer(without("/model", "vocab")), "model.vocab", "missing");
  EXPECT_BAD_INPUT(parse_tokenizer(without("/pre_tokenizer/pretokenizers/3", "use_regex")), "use_regex", "missing");
  for (const char* text : {"", "[]", "7", "null", "\"x\"", "{", "{}"})
    EXPECT_BAD_INPUT(Tokenizer::parse(text, "t.json"), "t.json") << text;
}

TEST(TokenizerJson, HugeNegativeAndFractionalIdsAreRefused) {
  for (const Json& id :
       {Json(1 << 22), Json(-1), Json(int64_t{1} << 40), Json(UINT64_MAX), Json(INT64_MIN), Json(1.0), Json("5")}) {
    EXPECT_BAD_INPUT(parse_tokenizer(with("/model/vocab/a", id)), "model.vocab[\"a\"]", "token id from 0 to 4194303");
    EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/2/id", id)), "added_tokens[2].id",
                     "token id from 0 to 4194303");
  }
}

TEST(TokenizerJson, OneIdForTwoTokensIsRefused) {
  const int id_of_b = tiny_tokenizer_json()["model"]["vocab"]["b"];
  EXPECT_BAD_INPUT(parse_tokenizer(with("/model/vocab/a", id_of_b)), "token id " + std::to_string(id_of_b), "\"a\"",
                   "\"b\"");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/2/id", id_of_b)), "\"b\"", kUser);
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/1/content", kBos)), "added_tokens[1].content",
                   "no earlier added token");
}

TEST(TokenizerJson, AddedTokensMustAgreeWithTheVocabulary) {
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/1/content", "the")), "added_tokens[1].id", "the id of \"the\"");
  // U+00E9 in the vocabulary is byte E9, as an added token it would be the character: one id cannot be both.
  Json json = tiny_tokenizer_json();
  json["added_tokens"].push_back(added_token(json["model"]["vocab"]["é"], "é"));
  EXPECT_BAD_INPUT(parse_tokenizer(json), "added token", "é", "byte-level form");
  // Listing a special token in both places, as real files do, is fine.
  Json both = with("/model/vocab", tiny_tokenizer_json()["model"]["vocab"]);
  both["model"]["vocab"][kBos] = 0;
  EXPECT_EQ(parse_tokenizer(both).token_id(kBos), 0);
}

TEST(TokenizerJson, EmptyAndOversizeAddedTokensAreRefused) {
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/1/content", "")), "added_tokens[1].content", "1 to 256 bytes");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/added_tokens/1/content", std::string(257, 'x'))), "added_tokens[1].content");
}

TEST(TokenizerJson, MergesThatMakeNoTokenOrUseNoneAreRefused) {
  EXPECT_BAD_INPUT(parse_tokenizer(with("/model/merges/0", {"q", "z"})), "model.merges[0]", "\"qz\"", "lacks");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/model/merges/1", {"nope", "e"})), "model.merges[1]", "\"nope\"", "lacks");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/model/merges/1", {"h", "nope"})), "model.merges[1]", "\"nope\"", "lacks");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/model/merges/1", {"h", "e"})), "model.merges[1]", "merged before");
}

TEST(TokenizerJson, MergesOfAnyOtherShapeAreRefused) {
  for (const Json& merge : {Json("he"), Json("h e x"), Json(3), Json::array({"h"}), Json::array({"h", "e", "x"}),
                            Json::array({"h", 1}), Json(nullptr)})
    EXPECT_BAD_INPUT(parse_tokenizer(with("/model/merges/0", merge)), "model.merges[0]");
}

TEST(TokenizerJson, MergesAsStringsAndAsPairsMeanTheSame) {
  const Json pairs = tiny_tokenizer_json();
  Json strings = pairs;
  for (Json& merge : strings["model"]["merges"])
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  EXPECT_EQ(parse_tokenizer(pairs).encode("the the ab"), parse_tokenizer(strings).encode("the the ab"));
}

TEST(TokenizerJson, EmptyVocabularyAndMissingBytesAreRefused) {
  Json json = with("/model/vocab", Json::object());
  json["model"]["merges"] = Json::array();
  EXPECT_BAD_INPUT(parse_tokenizer(json), "model.vocab", "found 0");
  EXPECT_BAD_INPUT(parse_tokenizer(without("/model/vocab", "z")), "model.vocab", "0x7a", "missing");
  EXPECT_BAD_INPUT(parse_tokenizer(with("/model/vocab", {{"a", 20}})), "tiny.json");
}

TEST(TokenizerJson, DeepNestingDuplicateKeysAndBadUtf8AreRefused) {
  const std::string deep = "{\"version\": " + std::string(100000, '[') + std::string(100000, ']') + "}";
  EXPECT_BAD_INPUT(Tokenizer::parse(deep, "t.json"), "t.json", "nested deeper");
  EXPECT_BAD_INPUT(Tokenizer::parse("{\"model\": {\"vocab\": {\"a\": 1, \"a\": 2}}}", "t.json"), "duplicate key", "a");
  EXPECT_BAD_INPUT(Tokenizer::parse("{\"version\": \"\xFF\"}", "t.json"), "t.json");
}

TEST(TokenizerJson, EveryTruncationOfAFileIsRefused) {
  const std::string text = tiny_tokenizer_json().dump();
  for (size_t length = 0; length < text.size(); length += 97)
    EXPECT_BAD_INPUT(Tokenizer::parse(std::string_view(text).substr(0, length), "t.json"), "t.json");
}

TEST(TokenizerJson, AnEmptyNormalizerSequenceAndABareByteLevelAreAccepted) {
  EXPECT_NO_THROW(parse_tokenizer(with("/normalizer", {{"type", "Sequence"}, {"normalizers", Json::array()}})));
  const Json byte_level = tiny_tokenizer_json()["pre_tokenizer"]["pretokenizers"][3];
  const Tokenizer tokenizer = parse_tokenizer(with("/pre_tokenizer", byte_level));
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode(" the the")), (std::vector<std::string>{" the", " the"}));
}

TEST(TokenizerJson, AMissingFileIsNamed) {
  EXPECT_BAD_INPUT(Tokenizer::load("/nonexistent/tokenizer.json"), "/nonexistent/tokenizer.json");
}

}  // namespace
}  // namespace dsv4::test
