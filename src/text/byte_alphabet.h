// The byte-level alphabet of tokenizer.json: every byte has a printable character, so that vocabularies are valid text.
//
// Bytes that are printable in Latin-1 (21..7E, A1..AC, AE..FF) stand for themselves; the other 68 are numbered upwards
// from U+0100 in byte order (space is U+0120).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace dsv4 {

class ByteAlphabet {
 public:
  ByteAlphabet();
  const std::string& character(uint8_t byte) const { return characters_[byte]; }  // UTF-8
  // The bytes a token stands for; nothing if it has a character outside the alphabet.
  std::optional<std::string> bytes_of(std::string_view token) const;

 private:
  static constexpr int kNumCodePoints = 256 + 68;
  std::array<std::string, 256> characters_;
  std::array<int16_t, kNumCodePoints> byte_of_code_point_;  // -1 = not in the alphabet
};

}  // namespace dsv4
