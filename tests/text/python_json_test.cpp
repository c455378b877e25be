// JSON as Python prints it: order, separators, escapes, floats.
#include "text/python_json.h"

#include <gtest/gtest.h>

#include "expect_error.h"

namespace dsv4::test {
namespace {

std::string reprint(const std::string& text) { return python_json(parse_ordered_json(text, "t")); }

TEST(PythonJson, OrderSeparatorsAndNonAsciiAreKept) {
  EXPECT_EQ(reprint(R"({"z":1,"a":[1,2,{}],"e":[],"é":"你😀"})"), R"({"z": 1, "a": [1, 2, {}], "e": [], "é": "你😀"})");
}

TEST(PythonJson, StringsEscapeWhatPythonEscapes) {
  EXPECT_EQ(python_json_string("\"\\/\n\r\t\b\f\x01\x1f\x7f"), R"("\"\\/\n\r\t\b\f\u0001\u001f)"
                                                               "\x7f\"");
  EXPECT_EQ(reprint(R"("\u00e9\u4f60\ud83d\ude00\/")"), "\"é你😀/\"");
}

TEST(PythonJson, NumbersPrintAsReprDoes) {
  const std::pair<const char*, const char*> cases[] = {{"0", "0"},
                                                       {"-7", "-7"},
                                                       {"18446744073709551615", "18446744073709551615"},
                                                       {"-9223372036854775808", "-9223372036854775808"},
                                                       {"1.0", "1.0"},
                                                       {"-0.0", "-0.0"},
                                                       {"0.1", "0.1"},
                                                       {"1e2", "100.0"},
                                                       {"1e15", "1000000000000000.0"},
                                                       {"1e16", "1e+16"},
                                                       {"1e22", "1e+22"},
                                                       {"0.0001", "0.0001"},
                                                       {"0.00001", "1e-05"},
                                                       {"2.5e-10", "2.5e-10"},
                                                       {"123456789.25", "123456789.25"},
                                                       {"5e-324", "5e-324"},
                                                       {"1.7976931348623157e308", "1.7976931348623157e+308"},
                                                       {"true", "true"},
                                                       {"null", "null"}};
  for (const auto& [text, expected] : cases) EXPECT_EQ(reprint(text), expected) << text;
}

TEST(PythonJson, HostileTextIsRefused) {
  EXPECT_BAD_INPUT(reprint(std::string(1000, '[') + std::string(1000, ']')), "nested deeper");
  EXPECT_BAD_INPUT(reprint("{\"a\": 1, \"a\": 2}"), "duplicate key");
  EXPECT_BAD_INPUT(reprint("{"), "invalid JSON");
  EXPECT_BAD_INPUT(reprint("1e999"), "t");
}

}  // namespace
}  // namespace dsv4::test
