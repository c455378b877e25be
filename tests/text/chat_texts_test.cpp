// The reader of encoding_dsv4.py: Python literals, what is not one, and the warning about changed texts.
#include "text/chat_texts.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/log.h"
#include "expect_error.h"
#include "text/python_constant.h"
#include "text/sha256.h"

namespace dsv4::test {
namespace {

std::string string_constant(const std::string& text) {
  const auto constant = find_python_constant(text, "NAME", "f.py");
  return constant ? std::get<std::string>(*constant) : "(none)";
}

TEST(PythonConstant, QuotesPrefixesEscapesAndJoinedLiterals) {
  EXPECT_EQ(string_constant("NAME = 'a\"b'"), "a\"b");
  EXPECT_EQ(string_constant("x = 1\nNAME = \"a\\n\\t\\\\\\'\\x41\\u4f60\\U0001F600\\101\\q\"  # c"),
            "a\n\t\\'A你😀A\\q");
  EXPECT_EQ(string_constant("NAME = \"\"\"a\n\"b\" \\\nc\"\"\"\n"), "a\n\"b\" c");
  EXPECT_EQ(string_constant("NAME = '''it's'''"), "it's");
  EXPECT_EQ(string_constant("NAME = r'a\\n' 'b\\n'"), "a\\nb\n");
  EXPECT_EQ(string_constant("NAME: str = (\n  \"a\"  # one\n  # none\n  'b'\n)\r\n"), "ab");
  EXPECT_EQ(string_constant("NAME = \"\""), "");
}

TEST(PythonConstant, OnlyTopLevelAssignmentsCount) {
  EXPECT_EQ(string_constant("\"\"\"\nNAME = 'in a docstring'\n\"\"\"\nNAME = 'real'"), "real");
  EXPECT_EQ(string_constant("def f():\n  NAME = 'local'\n"), "(none)");
  EXPECT_EQ(
      string_constant("x = [\nNAME == 'y'\n]\n# NAME = 'comment'\nMY_NAME = 'other'\nf('NAME = 1')\nNAME = 'real'"),
      "real");
  EXPECT_EQ(string_constant("y = 'don\\'t' + f\"\"\"\nNAME = 'no'\n\"\"\"\nNAME = 'real'"), "real");
  EXPECT_EQ(string_constant("NAME == 'x'"), "(none)");
  EXPECT_EQ(string_constant(""), "(none)");
}

TEST(PythonConstant, DictsOfStringsKeepTheirOrder) {
  const auto constant = find_python_constant(
      "NAME: Dict[str, str] = {\n  \"low\": \"\",  # x\n  \"high\": (\n \"a\" \"b\"\n ),\n  'max': 'c'\n}\n", "NAME",
      "f.py");
  EXPECT_EQ(std::get<PythonDict>(*constant), (PythonDict{{"low", ""}, {"high", "ab"}, {"max", "c"}}));
  EXPECT_TRUE(std::get<PythonDict>(*find_python_constant("NAME = {}", "NAME", "f.py")).empty());
}

TEST(PythonConstant, AnythingButALiteralIsRefusedWithItsLine) {
  for (const char* text : {"\nNAME = f'a'", "\nNAME = b'a'", "\nNAME = 3", "\nNAME = other", "\nNAME = 'a' + b",
                           "\nNAME = 'a'.strip()", "\nNAME = ('a', 'b')", "\nNAME = {'a': 1}", "\nNAME = {'a'}",
                           "\nNAME = {'a': 'b' 'c': 'd'}", "\nNAME = '\\ud800'", "\nNAME = '\\xg0'", "\nNAME = 'abc",
                           "\nNAME = ", "\nNAME = ('a'", "\nNAME = {'a': 'b'", "\nNAME = 'a\\"})
    EXPECT_BAD_INPUT(find_python_constant(text, "NAME", "f.py"), "f.py: line 2: NAME: expected") << text;
  EXPECT_BAD_INPUT(find_python_constant("NAME = \"\"\"abc\n", "NAME", "f.py"), "f.py: line", "a closing quote");
}

TEST(Sha256, MatchesTheStandardsExamples) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(ChatTexts, LaterEncodersNameEveryEffortLevel) {
  const ChatTexts texts =
      ChatTexts::parse("REASONING_EFFORT_PROMPTS: Dict[str, str] = {'low': '', 'high': 'H', 'max': 'M'}", "f.py");
  EXPECT_EQ(texts.effort_prefix("low"), "");
  EXPECT_EQ(texts.effort_prefix("high"), "H");
  EXPECT_EQ(texts.effort_prefix("max"), "M");
  EXPECT_EQ(texts.effort_prefix(""), "");
  EXPECT_BAD_INPUT(texts.effort_prefix("medium"), "none, high, low, max", "\"medium\"");
  EXPECT_BAD_INPUT(texts.tools_template.require(), "f.py: TOOLS_TEMPLATE: missing");
}

TEST(ChatTexts, UnreadableConstantsAreReportedWhenNeededOnly) {
  const ChatTexts texts =
      ChatTexts::parse("TOOLS_TEMPLATE = make()\nREASONING_EFFORT_MAX = 3\nresponse_format_template = {}", "f.py");
  EXPECT_BAD_INPUT(texts.tools_template.require(), "f.py: line 1: TOOLS_TEMPLATE");
  EXPECT_BAD_INPUT(texts.effort_prefix("max"), "f.py: line 2: REASONING_EFFORT_MAX");
  EXPECT_BAD_INPUT(texts.response_format_template.require(), "expected a string, found a dict");
  EXPECT_EQ(texts.effort_prefix("none"), "");
}

TEST(ChatTexts, ATextThatIsNotTheKnownOneIsUsedWithAWarning) {
  const std::filesystem::path dir = std::filesystem::path(::testing::TempDir()) / "dsv4_chat_texts";
  std::filesystem::create_directories(dir / "encoding");
  std::ofstream(dir / "encoding/encoding_dsv4.py") << "TOOLS_TEMPLATE = 'changed'\n";
  std::vector<std::string> warnings;
  set_log_sink([&](LogLevel, std::string_view message) { warnings.emplace_back(message); }, LogLevel::kWarning);
  const ChatTexts texts = ChatTexts::load(dir.string());
  set_log_sink(nullptr, LogLevel::kOff);
  EXPECT_EQ(texts.tools_template.require(), "changed");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].find("TOOLS_TEMPLATE differs"), std::string::npos) << warnings[0];
  EXPECT_NE(warnings[0].find(sha256_hex("changed")), std::string::npos) << warnings[0];
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace dsv4::test
