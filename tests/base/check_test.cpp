// Errors, overflow-checked arithmetic, the log sink.
#include "base/check.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "base/log.h"
#include "base/math.h"

namespace dsv4 {
namespace {

template <class Body>
Error caught(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  throw std::logic_error("no error thrown");
}

TEST(Check, KindsAreTheDocumentedExitCodes) {
  EXPECT_EQ(caught([] { throw_bad_input("file {}", 7); }).exit_code(), 1);
  EXPECT_EQ(caught([] { throw_usage("x"); }).exit_code(), 2);
  EXPECT_EQ(caught([] { throw_resource("x"); }).exit_code(), 3);
  EXPECT_EQ(caught([] { DSV4_CHECK(1 + 1 == 3, "numbers {}", 5); }).exit_code(), 4);
  EXPECT_STREQ(caught([] { throw_bad_input("file {}", 7); }).what(), "file 7");
}

TEST(Check, FailedChecksNameConditionValuesAndPlace) {
  const Error error = caught([] { DSV4_CHECK(1 + 1 == 3, "numbers {}", 5); });
  const std::string text = error.what();
  for (const char* part : {"check_test.cpp:", "1 + 1 == 3", "numbers 5"})
    EXPECT_NE(text.find(part), std::string::npos) << text;
  EXPECT_NO_THROW(DSV4_CHECK(true, "unused"));
}

TEST(Math, OverflowIsReported) {
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(checked_mul(kMax, 1), kMax);
  EXPECT_EQ(checked_mul(1ull << 32, 1ull << 32), std::nullopt);
  EXPECT_EQ(checked_mul(0, kMax), 0u);
  EXPECT_EQ(checked_add(kMax, 0), kMax);
  EXPECT_EQ(checked_add(kMax, 1), std::nullopt);
}

TEST(Math, RoundsUp) {
  EXPECT_EQ(ceil_div(0, 4), 0);
  EXPECT_EQ(ceil_div(1, 4), 1);
  EXPECT_EQ(ceil_div(4, 4), 1);
  EXPECT_EQ(ceil_div(5, 4), 2);
  EXPECT_EQ(round_up(129, 128), 256);
}

TEST(Log, ReachesTheSinkFromTheThresholdUp) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, std::string_view text) { lines.emplace_back(text); }, LogLevel::kWarning);
  log(LogLevel::kInfo, "quiet {}", 1);
  log(LogLevel::kWarning, "loud {}", 2);
  set_log_sink(nullptr, LogLevel::kDebug);
  EXPECT_FALSE(log_enabled(LogLevel::kError));
  log(LogLevel::kError, "nobody listens");
  EXPECT_EQ(lines, std::vector<std::string>{"loud 2"});
}

}  // namespace
}  // namespace dsv4
