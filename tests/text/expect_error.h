// EXPECT_BAD_INPUT(statement, "a", "b"): throws dsv4::Error of kind bad input whose message has every given part.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"

namespace dsv4::test {

template <class Function>
::testing::AssertionResult throws_bad_input(Function&& function, const std::vector<std::string_view>& parts) {
  try {
    function();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kBadInput)
      return ::testing::AssertionFailure() << "kind " << error.exit_code() << ": " << error.what();
    for (const std::string_view part : parts)
      if (std::string_view(error.what()).find(part) == std::string_view::npos)
        return ::testing::AssertionFailure() << "\"" << error.what() << "\" lacks \"" << part << "\"";
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "nothing was thrown";
}

}  // namespace dsv4::test

#define EXPECT_BAD_INPUT(statement, ...) \
  EXPECT_TRUE(::dsv4::test::throws_bad_input([&] { (void)(statement); }, {__VA_ARGS__}))
