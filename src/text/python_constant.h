// Reads string constants out of Python source text without running it: NAME = "..." and NAME = {"key": "..."} at top level.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace dsv4 {

using PythonDict = std::vector<std::pair<std::string, std::string>>;  // in source order
using PythonConstant = std::variant<std::string, PythonDict>;

// The first top-level assignment to name; nothing if there is none. Understood: single, double and triple quotes, raw
// strings, escapes, neighbouring literals joined, brackets around them, comments, a type annotation.
// Throws bad input naming source, line and name when the value is anything else (f-strings, expressions, numbers).
std::optional<PythonConstant> find_python_constant(std::string_view text, std::string_view name,
                                                   const std::string& source);

}  // namespace dsv4
