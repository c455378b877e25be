// JSON from untrusted files: nlohmann's parser behind limits that are checked while parsing.
//
// Refused with a dsv4::Error (bad input) that names the source: syntax errors, nesting deeper than max_depth, duplicate
// keys in one object, text larger than max_bytes, invalid UTF-8.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dsv4 {

using Json = nlohmann::json;

struct JsonLimits {
  uint64_t max_bytes = 256ull << 20;
  int max_depth = 64;
};

// source: what to call the text in errors (usually the path).
Json parse_json(std::string_view text, const std::string& source, const JsonLimits& limits = {});

// Reads the whole file (size checked before allocation) and parses it.
Json read_json_file(const std::string& path, const JsonLimits& limits = {});

}  // namespace dsv4
