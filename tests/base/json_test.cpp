// JSON from untrusted text: limits hold while parsing, and messages name the source.
#include "base/json.h"

#include <gtest/gtest.h>

#include <string>

#include "base/check.h"

namespace dsv4 {
namespace {

void expect_refused(std::string_view text, std::string_view part, const JsonLimits& limits = {}) {
  try {
    parse_json(text, "some.json", limits);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kBadInput);
    EXPECT_EQ(std::string(error.what()).find("some.json: "), 0u) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    return;
  }
  FAIL() << "accepted: " << text.substr(0, 80);
}

TEST(Json, ParsesOrdinaryText) {
  const Json json = parse_json(R"({"a": [1, -2, 2.5, true, null], "b": {"a": "\u00e9"}})", "x");
  EXPECT_EQ(json.at("a").size(), 5u);
  EXPECT_EQ(json.at("b").at("a"), "é");
  EXPECT_EQ(parse_json("18446744073709551615", "x").get<uint64_t>(), UINT64_MAX);
}

TEST(Json, SyntaxErrorsNameThePosition) {
  for (const char* text : {"", "{", "[1,]", "{\"a\" 1}", "{\"a\":1} x", "nul", "'a'", "[1e400]", "\"\\ud800\"", "{,}"})
    expect_refused(text, "at byte");
}

TEST(Json, EveryTruncationIsRefused) {
  const std::string whole = R"({"a": [1, 2, {"b": "text"}], "c": 1.5})";
  for (size_t length = 0; length < whole.size(); ++length) expect_refused(whole.substr(0, length), "invalid JSON");
}

TEST(Json, InvalidUtf8IsRefused) {
  expect_refused("\"\xff\"", "invalid JSON");
  expect_refused("\"\xc3\"", "invalid JSON");
  expect_refused("\"\xed\xa0\x80\"", "invalid JSON");
}

TEST(Json, DuplicateKeysAreRefusedPerObject) {
  expect_refused(R"({"a": 1, "a": 2})", "duplicate key \"a\"");
  expect_refused(R"({"x": {"b": 1, "c": 2, "b": 3}})", "duplicate key \"b\"");
  expect_refused("{\"a\": 1, \"\\u0061\": 2}", "duplicate key \"a\"");
  EXPECT_EQ(parse_json(R"({"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 2}]})", "x").size(), 2u);
}

TEST(Json, DepthIsLimitedBeforeAnythingOverflows) {
  const auto nested = [](int depth) {
    return std::string(static_cast<size_t>(depth), '[') + std::string(static_cast<size_t>(depth), ']');
  };
  EXPECT_NO_THROW(parse_json(nested(64), "x"));
  expect_refused(nested(65), "nested deeper than 64");
  expect_refused(nested(100000), "nested deeper than 64");
  expect_refused(std::string(100000, '['), "nested deeper than 64");
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += "{\"a\":";
  expect_refused(objects, "nested deeper than 64");
  expect_refused("[[1]]", "nested deeper than 1 levels", {.max_depth = 1});
}

TEST(Json, SizeIsLimited) {
  EXPECT_NO_THROW(parse_json("[1]", "x", {.max_bytes = 3}));
  expect_refused("[1] ", "4 bytes, at most 3", {.max_bytes = 3});
}

}  // namespace
}  // namespace dsv4
