// Encoding and decoding: added tokens, pieces, bytes that are not text.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "expect_error.h"
#include "text/utf8.h"
#include "tiny_tokenizer.h"

namespace dsv4::test {
namespace {

using Strings = std::vector<std::string>;

std::vector<TokenId> ids_of(const Tokenizer& tokenizer, const Strings& contents) {
  std::vector<TokenId> ids;
  for (const std::string& content : contents) ids.push_back(tokenizer.token_id(content).value());
  return ids;
}

TEST(Tokenizer, AddedTokensAreFoundInRawTextAndNothingIsAddedAround) {
  const Tokenizer tokenizer = tiny_tokenizer();
  EXPECT_EQ(tokenizer.encode(kBos + kUser + "the" + kEos), ids_of(tokenizer, {kBos, kUser, "the", kEos}));
  EXPECT_TRUE(tokenizer.encode("").empty());
}

TEST(Tokenizer, TheDsmlTagIsOneSpecialTokenInsideOrdinaryText) {
  const Tokenizer tokenizer = tiny_tokenizer();
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("<" + kDsml + "the>")), (Strings{"<", kDsml, "the", ">"}));
}

TEST(Tokenizer, UntrustedTextNeverYieldsAnAddedToken) {
  Json json = tiny_tokenizer_json();
  json["added_tokens"].push_back(added_token(900, "<plain>", false, true));
  const Tokenizer tokenizer = parse_tokenizer(json);
  const std::string text = kBos + kUser + "a</think><plain>" + kDsml;
  for (const TokenId id : tokenizer.encode(text, false)) {
    EXPECT_FALSE(tokenizer.is_special(id));
    EXPECT_LT(id, 900);
  }
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false)), text);
  EXPECT_EQ(tokenizer.encode("<plain>"), (std::vector<TokenId>{900}));
}

TEST(Tokenizer, TheLongestAddedTokenAtTheLeftmostPositionWins) {
  Json json = tiny_tokenizer_json();
  json["added_tokens"].push_back(added_token(900, "<t"));
  json["added_tokens"].push_back(added_token(901, "think>x"));
  const Tokenizer tokenizer = parse_tokenizer(json);
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("<think>x")), (Strings{"<think>", "x"}));
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("<thin think>x")), (Strings{"<t", "h", "i", "n", " ", "think>x"}));
}

TEST(Tokenizer, NormalizedAddedTokensSeeOnlyWhatTheOthersLeave) {
  Json json = tiny_tokenizer_json();
  json["added_tokens"].push_back(added_token(900, "ab<", false, true));  // leftmost, but in the second pass
  const Tokenizer tokenizer = parse_tokenizer(json);
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("ab<think>ab<")), (Strings{"ab", "<think>", "ab<"}));
}

TEST(Tokenizer, SplitsApplyOneAfterTheOther) {
  // "1a": the digit is cut away first, so the letter run of the third pattern cannot take it as its one leading character.
  const Tokenizer tokenizer =
      parse_tokenizer(tiny_tokenizer_json({{"1", "a"}, {"Ġ", "a"}, {"1", "2"}, {"12", "3"}, {"123", "4"}, {"a", "1"}}));
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("1a a1234")), (Strings{"1", "a", " a", "123", "4"}));
}

TEST(Tokenizer, SymbolsCountAsPunctuationAndKeepTheirSpaceAndNewlines) {
  const Tokenizer tokenizer =
      parse_tokenizer(tiny_tokenizer_json({{"Ġ", "~"}, {"+", "Ċ"}, {".", "Ċ"}, {".Ċ", "Ċ"}, {"Ċ", "Ċ"}}));
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("x ~")), (Strings{"x", " ~"}));
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("x+\ny")), (Strings{"x", "+\n", "y"}));
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("x.\n\ny")), (Strings{"x", ".\n\n", "y"}));
}

TEST(Tokenizer, BytesThatAreNotUtf8RoundTrip) {
  const Tokenizer tokenizer = tiny_tokenizer();
  for (const std::string text : {"\xFF", "a\xE4\xBDthe", "\xED\xA0\x80", "the\xF0\x9F\x98", "\x80\x80 the"}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
  EXPECT_EQ(pieces(tokenizer, tokenizer.encode("\xE4\xBD the")), (Strings{"\xE4", "\xBD", " the"}));
  const std::string with_nul("the\0the", 7);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(with_nul)), with_nul);
}

TEST(Tokenizer, DecodeOfEncodeIsTheTextForRandomUnicodeAndRandomBytes) {
  const Tokenizer tokenizer = tiny_tokenizer();
  std::mt19937 random(2);
  for (int round = 0; round < 4000; ++round) {
    std::string text;
    const int count = static_cast<int>(random() % 40);
    for (int i = 0; i < count; ++i) {
      switch (random() % 6) {
        case 0:
          text.push_back(static_cast<char>(random()));
          break;
        case 1:
          text += "<think>";
          break;
        case 2:
          text.push_back(static_cast<char>(random() % 128));
          break;
        case 3:
          text += random() % 2 ? " the" : "\r\n ";
          break;
        case 4:
          append_utf8(text, 0x3000 + random() % 0x7000);
          break;
        default:
          append_utf8(text, random() % 0xD800);
          break;
      }
    }
    const bool parse_special = random() % 2;
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, parse_special)), text);
  }
}

TEST(Tokenizer, DecodeSkipsSpecialTokensOnlyWhenAsked) {
  const Tokenizer tokenizer = tiny_tokenizer();
  const auto ids = tokenizer.encode(kBos + "the" + kEos);
  EXPECT_EQ(tokenizer.decode(ids), kBos + "the" + kEos);
  EXPECT_EQ(tokenizer.decode(ids, true), "the");
}

TEST(Tokenizer, IdsOutsideTheVocabularyAndHolesThrow) {
  Json json = tiny_tokenizer_json();
  json["added_tokens"].push_back(added_token(400, "<late>"));
  const Tokenizer tokenizer = parse_tokenizer(json);
  EXPECT_EQ(tokenizer.vocab_size(), 401);
  EXPECT_EQ(tokenizer.token_bytes(400), "<late>");
  for (const TokenId id : {-1, 399, 401, 1 << 30}) {
    EXPECT_BAD_INPUT(tokenizer.token_bytes(id), "token id ", "not in the vocabulary");
    EXPECT_BAD_INPUT(tokenizer.decode(std::vector<TokenId>{id}), "not in the vocabulary of 401 ids");
    EXPECT_BAD_INPUT(tokenizer.is_special(id), "token id");
  }
  EXPECT_EQ(tokenizer.token_id("no such token"), std::nullopt);
}

TEST(Tokenizer, OneTokenizerServesSeveralThreads) {
  const Tokenizer tokenizer = tiny_tokenizer();
  const std::string text = "the 123 thethe ab 你好 \n\n<think>ab";
  const auto expected = tokenizer.encode(text);
  std::vector<std::thread> threads;
  std::array<int, 4> equal{};
  for (int& count : equal)
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) count += tokenizer.encode(text) == expected;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(equal, (std::array<int, 4>{200, 200, 200, 200}));
}

}  // namespace
}  // namespace dsv4::test
