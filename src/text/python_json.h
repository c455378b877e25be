// JSON the way Python's json.dumps(value, ensure_ascii=False) prints it, which is what the model was trained on.
//
// Key order is kept, separators are ", " and ": ", non-ASCII stays, floats print as repr(). One difference from Python:
// integers beyond 64 bits become floats.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dsv4 {

using OrderedJson = nlohmann::ordered_json;

// The checks of base/json.h (depth, size, duplicate keys, UTF-8), with key order kept.
OrderedJson parse_ordered_json(std::string_view text, const std::string& source);

std::string python_json(const OrderedJson& value);
std::string python_json_string(std::string_view text);

}  // namespace dsv4
