// Fuzzes the completion parser and its streaming form, which must agree, and the reader of encoding_dsv4.py.
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

#include "base/check.h"
#include "text/chat_parser.h"
#include "text/chat_texts.h"

namespace {

std::optional<dsv4::ParsedCompletion> parse(std::string_view text, dsv4::ThinkingMode mode) {
  try {
    return dsv4::parse_completion(text, mode);
  } catch (const dsv4::Error& error) {
    if (error.kind() != dsv4::ErrorKind::kBadInput) std::abort();
    return std::nullopt;
  }
}

void check_stream(std::string_view text, dsv4::ThinkingMode mode, size_t step) {
  const auto whole = parse(text, mode);
  dsv4::CompletionStream stream(mode);
  std::string reasoning, content;
  try {
    for (size_t at = 0; at < text.size(); at += step) {
      const auto delta = stream.push(text.substr(at, step));
      reasoning += delta.reasoning;
      content += delta.content;
    }
    stream.finish();
  } catch (const dsv4::Error&) {
    if (whole) std::abort();
    return;
  }
  if (!whole || whole->reasoning != reasoning || whole->content != content) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] >= 224) {
    const auto texts = dsv4::ChatTexts::parse(text, "fuzz.py");
    if (texts.tools_template.problem.empty() && texts.tools_template.value.size() > text.size()) std::abort();
    return 0;
  }
  const auto mode = data[0] % 2 ? dsv4::ThinkingMode::kThinking : dsv4::ThinkingMode::kChat;
  check_stream(text, mode, 1 + data[0] / 2 % 16);
  return 0;
}
