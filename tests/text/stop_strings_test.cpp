// Stop strings against a brute-force search, for every way to cut the text.
#include "text/stop_strings.h"

#include <gtest/gtest.h>

#include <random>

#include "base/check.h"
#include "text/utf8.h"

namespace dsv4 {
namespace {

struct Outcome {
  std::string text;
  std::optional<std::string> matched;
  bool operator==(const Outcome&) const = default;
};

// Byte by byte: the first end of any stop string, the longest one that ends there.
Outcome search(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    const std::string_view head = std::string_view(text).substr(0, end);
    const std::string* best = nullptr;
    for (const std::string& stop : stops)
      if (head.ends_with(stop) && (best == nullptr || stop.size() > best->size())) best = &stop;
    if (best != nullptr) return {text.substr(0, end - best->size()), *best};
  }
  return {text, std::nullopt};
}

TEST(StopStrings, RandomTextsInRandomPiecesMatchBruteForce) {
  std::mt19937 random(3);
  for (int round = 0; round < 5000; ++round) {
    const auto word = [&](size_t length) {
      std::string out(length, 'a');
      for (char& c : out) c = static_cast<char>('a' + random() % 2);
      return out;
    };
    std::vector<std::string> stops;
    for (size_t i = 0; i < 1 + random() % 3; ++i) stops.push_back(word(1 + random() % 6));
    const std::string text = word(random() % 30);
    StopStrings stream(stops);
    Outcome outcome;
    for (size_t at = 0; at < text.size();) {
      const size_t length = 1 + random() % 5;
      outcome.text += stream.push(std::string_view(text).substr(at, length));
      at += length;
    }
    outcome.text += stream.finish();
    outcome.matched = stream.matched();
    EXPECT_EQ(outcome, search(text, stops)) << text;
  }
}

TEST(StopStrings, TextThatMayBecomeAStopStringIsHeldBackAndReleased) {
  StopStrings stream({"\n\nUser:", "###"});
  EXPECT_EQ(stream.push("Hello\n"), "Hello");
  EXPECT_EQ(stream.push("\nUs"), "");
  EXPECT_EQ(stream.push("e it #"), "\n\nUse it ");
  EXPECT_EQ(stream.push("#"), "");
  EXPECT_EQ(stream.finish(), "##");
  EXPECT_FALSE(stream.matched());
}

TEST(StopStrings, AStopStringOverSeveralTokensShowsNoPartOfItself) {
  StopStrings stream({"END"});
  std::string shown;
  for (const char* token : {"the E", "N", "D of it", "more"}) shown += stream.push(token);
  EXPECT_EQ(shown + stream.finish(), "the ");
  EXPECT_EQ(stream.matched(), "END");
}

TEST(StopStrings, WholeCharactersStayWhole) {
  StopStrings stream({"好了", "😀"});
  std::string shown;
  for (const char* token : {"你", "好", "好", "了", "x"}) {
    const std::string part = stream.push(token);
    EXPECT_EQ(valid_utf8_prefix(part), part.size());
    shown += part;
  }
  EXPECT_EQ(shown, "你好");
  EXPECT_EQ(stream.matched(), "好了");
}

TEST(StopStrings, WithoutStopStringsEverythingPassesAtOnce) {
  StopStrings stream({});
  EXPECT_EQ(stream.push("abc"), "abc");
  EXPECT_EQ(stream.finish(), "");
}

TEST(StopStrings, EmptyAndInvalidStopStringsAreRefused) {
  EXPECT_THROW(StopStrings({"a", ""}), Error);
  EXPECT_THROW(StopStrings({"\xFF"}), Error);
}

}  // namespace
}  // namespace dsv4
