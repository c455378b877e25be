// UTF-8 units and the stream that holds back unfinished characters.
#include "text/utf8.h"

#include <gtest/gtest.h>

#include <random>

#include "text/tokenizer.h"

namespace dsv4 {
namespace {

TEST(Utf8, EveryCodePointIsOneValidUnitAndEveryPrefixIsIncomplete) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c == 0xD800) c = 0xE000;
    std::string text;
    append_utf8(text, c);
    const Utf8Unit unit = read_utf8(text);
    ASSERT_EQ(unit.kind, Utf8Kind::kValid) << static_cast<uint32_t>(c);
    ASSERT_EQ(static_cast<size_t>(unit.length), text.size()) << static_cast<uint32_t>(c);
    for (size_t cut = 1; cut < text.size(); ++cut)
      ASSERT_EQ(read_utf8(std::string_view(text).substr(0, cut)).kind, Utf8Kind::kIncomplete)
          << static_cast<uint32_t>(c);
  }
}

TEST(Utf8, SurrogatesOverlongFormsAndValuesAboveU10FFFFAreInvalid) {
  for (const std::string_view text : {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80",
                                      "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xFE"}) {
    const Utf8Unit unit = read_utf8(text);
    EXPECT_EQ(unit.kind, Utf8Kind::kInvalid);
    EXPECT_EQ(unit.length, 1);
  }
  EXPECT_EQ(read_utf8("\xE4\xBDx").length, 2);
  EXPECT_EQ(read_utf8("\xF0\x9F\x98x").length, 3);
}

TEST(Utf8Stream, AnyCutOfTheBytesGivesTheSameTextInWholeCharacters) {
  const std::string text = "aé你😀\xFFz\xE4\xBDq\xF0\x9F\x98\xED\xA0\x80.";
  const std::string expected = "aé你😀\uFFFDz\uFFFDq\uFFFD\uFFFD\uFFFD\uFFFD.";
  for (size_t step = 1; step <= text.size(); ++step) {
    Utf8Stream stream;
    std::string out;
    for (size_t at = 0; at < text.size(); at += step) {
      const std::string part = stream.push(std::string_view(text).substr(at, step));
      EXPECT_EQ(valid_utf8_prefix(part), part.size());
      out += part;
    }
    out += stream.finish();
    EXPECT_EQ(out, expected) << step;
  }
}

TEST(Utf8Stream, HoldsBackAnUnfinishedCharacterAndReplacesItAtTheEnd) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("x\xF0\x9F"), "x");
  EXPECT_EQ(stream.push("\x98"), "");
  EXPECT_EQ(stream.push("\x80y"), "😀y");
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.push("\xE4\xBD"), "");
  EXPECT_EQ(stream.finish(), "\uFFFD");
  EXPECT_EQ(stream.finish(), "");
}

}  // namespace
}  // namespace dsv4
