// Implementation of text/byte_alphabet.h.
#include "text/byte_alphabet.h"

#include "text/utf8.h"

namespace dsv4 {

ByteAlphabet::ByteAlphabet() {
  byte_of_code_point_.fill(-1);
  char32_t next_moved = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    const char32_t code_point = printable ? static_cast<char32_t>(byte) : next_moved++;
    append_utf8(characters_[byte], code_point);
    byte_of_code_point_[code_point] = static_cast<int16_t>(byte);
  }
}

std::optional<std::string> ByteAlphabet::bytes_of(std::string_view token) const {
  std::string bytes;
  size_t at = 0;
  while (at < token.size()) {
    // The alphabet ends at U+0143: one or two UTF-8 bytes.
    const Utf8Unit unit = read_utf8(token.substr(at));
    if (unit.kind != Utf8Kind::kValid || unit.length > 2) return std::nullopt;
    const auto first = static_cast<uint8_t>(token[at]);
    const int code_point =
        unit.length == 1 ? first : (first & 0x1F) << 6 | (static_cast<uint8_t>(token[at + 1]) & 0x3F);
    if (code_point >= kNumCodePoints || byte_of_code_point_[code_point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte_of_code_point_[code_point]));
    at += static_cast<size_t>(unit.length);
  }
  return bytes;
}

}  // namespace dsv4
