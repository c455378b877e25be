// Oniguruma patterns run by PCRE2: what is translated, what is refused, which characters the classes have.
#include "text/split_pattern.h"

#include <gtest/gtest.h>

#include "expect_error.h"
#include "text/utf8.h"

namespace dsv4 {
namespace {

std::vector<std::string> matches(std::string_view pattern, std::string_view text) {
  const SplitPattern compiled(pattern, "test");
  SplitPattern::Matcher matcher(compiled);
  std::vector<std::string> out;
  TextRange match{};
  for (size_t at = 0; at < text.size() && matcher.find(text, at, match); at = match.end)
    out.emplace_back(text.substr(match.begin, match.end - match.begin));
  return out;
}

using Strings = std::vector<std::string>;

TEST(SplitPattern, ClassesAndEscapesAreRewrittenToOneMeaning) {
  EXPECT_EQ(translate_split_pattern(R"(\s+(?!\S)|[\s\d]|\u4e00|\x{41}|\p{N}{1,3})", "t"),
            R"(\p{White_Space}+(?!\P{White_Space})|[\p{White_Space}\p{Nd}]|\x{4e00}|\x{41}|\p{N}{1,3})");
}

TEST(SplitPattern, ConstructsWithAnotherMeaningInPcre2AreRefusedByName) {
  for (const std::string_view pattern :
       {"\\w+",    "\\W",     "a\\b",        "\\h",     "\\R",   "\\X",   "\\K",      "\\1",        "\\Qa", "^a",
        "a$",      "[a[bc]]", "[[:alpha:]]", "[a&&b]",  "[]a]",  "[^]a]", "\\p{Han}", "\\p{Greek}", "\\pL", "(?i:a)",
        "(?<n>a)", "(?#c)a",  "(?R)",        "(*UTF)a", "a{,3}", "a{2}+", "a{x}",     "\\x41",      "\\u00"})
    EXPECT_BAD_INPUT(SplitPattern(pattern, "f.json: key"), "f.json: key", "unsupported construct", pattern);
}

TEST(SplitPattern, SyntaxErrorsEmptyMatchesAndOversizeAreRefused) {
  EXPECT_BAD_INPUT(SplitPattern("(a", "f.json: key"), "f.json: key", "does not compile");
  EXPECT_BAD_INPUT(SplitPattern("[a", "f.json: key"), "does not compile");
  EXPECT_BAD_INPUT(SplitPattern("a\\", "f.json: key"), "f.json: key");
  EXPECT_BAD_INPUT(SplitPattern("((a{1000}){1000}){1000}", "f.json: key"), "does not compile");
  EXPECT_BAD_INPUT(SplitPattern(std::string(1000, '(') + "a" + std::string(1000, ')'), "f.json: key"),
                   "does not compile");
  EXPECT_BAD_INPUT(SplitPattern("a*", "f.json: key"), "can match nothing");
  EXPECT_BAD_INPUT(matches("a|(?=b)", "ab"), "can match nothing");
  EXPECT_BAD_INPUT(SplitPattern("", "f.json: key"), "expected 1 to");
  EXPECT_BAD_INPUT(SplitPattern(std::string(100000, 'a'), "f.json: key"), "100000 bytes");
}

TEST(SplitPattern, WhiteSpaceIsTheUnicodePropertyAndNothingElse) {
  const SplitPattern pattern("\\s", "t");
  SplitPattern::Matcher matcher(pattern);
  std::vector<char32_t> found;
  for (char32_t c = 0; c < 0x3100; ++c) {
    std::string text;
    append_utf8(text, c);
    TextRange match{};
    if (matcher.find(text, 0, match)) found.push_back(c);
  }
  EXPECT_EQ(found, (std::vector<char32_t>{0x09,   0x0A,   0x0B,   0x0C,   0x0D,   0x20,   0x85,   0xA0,   0x1680,
                                          0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006, 0x2007, 0x2008,
                                          0x2009, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}));
}

TEST(SplitPattern, RangesOfIdeographsAreCodePointRanges) {
  EXPECT_EQ(matches("[一-龥]+", "\u4DFF一龥\u9FA6a丿"), (Strings{"一龥", "丿"}));
}

TEST(SplitPattern, LookAheadSeesTheEndOfThePieceOnly) {
  EXPECT_EQ(matches("\\s+(?!\\S)|\\s+", "   x "), (Strings{"  ", " ", " "}));
}

TEST(SplitPattern, ExponentialBacktrackingEndsInAnErrorThatNamesThePattern) {
  const SplitPattern pattern("(?:\\p{L}+)+\\p{N}", "f.json: key");
  SplitPattern::Matcher matcher(pattern);
  TextRange match{};
  EXPECT_BAD_INPUT(matcher.find(std::string(64, 'a') + "!", 0, match), "f.json: key", "(?:\\p{L}+)+\\p{N}",
                   "match limit");
}

}  // namespace
}  // namespace dsv4
