// Fuzzes the tokenizer: a first byte below 128 makes the rest a tokenizer.json, above it a text for the bundled tokenizer.
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "base/check.h"
#include "text/tokenizer.h"

namespace {

const dsv4::Tokenizer& demo_tokenizer() {
  static const dsv4::Tokenizer tokenizer = [] {
    const std::filesystem::path root = std::filesystem::path(__FILE__).parent_path().parent_path();
    for (const char* path : {"models/demo/tokenizer.json", "../shared/demo-model/tokenizer.json"})
      if (std::filesystem::exists(root / path)) return dsv4::Tokenizer::load((root / path).string());
    throw std::runtime_error("no bundled tokenizer to fuzz with");
  }();
  return tokenizer;
}

// Every text must come back.
void check_round_trip(const dsv4::Tokenizer& tokenizer, std::string_view text) {
  if (tokenizer.decode(tokenizer.encode(text)) != text) std::abort();
  const auto ids = tokenizer.encode(text, false);
  if (tokenizer.decode(ids) != text) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] < 128) {
    try {
      const dsv4::Tokenizer tokenizer = dsv4::Tokenizer::parse(rest, "fuzz.json");
      check_round_trip(tokenizer, "the 123 \n\n你好 a\xFF<think>");
    } catch (const dsv4::Error& error) {
      if (error.kind() != dsv4::ErrorKind::kBadInput) std::abort();
    }
  } else {
    const dsv4::Tokenizer& tokenizer = demo_tokenizer();
    check_round_trip(tokenizer, rest);
    for (const dsv4::TokenId id : tokenizer.encode(rest, false))
      if (tokenizer.is_special(id)) std::abort();
    dsv4::Utf8Stream whole, bytewise;
    std::string expected = whole.push(rest) + whole.finish(), found;
    for (const char byte : rest) found += bytewise.push({&byte, 1});
    if (found + bytewise.finish() != expected) std::abort();
  }
  return 0;
}
