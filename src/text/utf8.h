// UTF-8: one character at a time from untrusted bytes, by Unicode's table 3-7 (no surrogates, nothing overlong).
#pragma once

#include <string>
#include <string_view>

namespace dsv4 {

enum class Utf8Kind {
  kValid,       // one whole character
  kInvalid,     // the longest prefix that no continuation can complete (what one U+FFFD replaces)
  kIncomplete,  // the text ends inside a character that is valid so far
};

struct Utf8Unit {
  Utf8Kind kind;
  int length;  // bytes, 1..4
};

// The unit at the start of text, which must not be empty.
Utf8Unit read_utf8(std::string_view text);

// Bytes of the longest prefix made of whole characters.
size_t valid_utf8_prefix(std::string_view text);

// code_point: a Unicode scalar value.
void append_utf8(std::string& out, char32_t code_point);

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

}  // namespace dsv4
