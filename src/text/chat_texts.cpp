// Implementation of text/chat_texts.h.
#include "text/chat_texts.h"

#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "text/python_constant.h"
#include "text/sha256.h"

namespace dsv4 {
namespace {

constexpr uint64_t kMaxFileBytes = 4 << 20;

// SHA-256 of the raw constants of the preview encoder. TOOLS_TEMPLATE is the text whose rendering with zero tools has the
// hash of spec section 8.4; REASONING_EFFORT_MAX is hashed in 8.5.
constexpr std::string_view kToolsTemplateHash = "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8";
constexpr std::string_view kResponseFormatHash = "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5";
constexpr std::string_view kEffortHash = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7";

void warn_if_changed(const std::string& source, std::string_view name, const std::string& value,
                     std::string_view hash) {
  const std::string found = sha256_hex(value);
  if (found != hash)
    log(LogLevel::kWarning, "{}: {} differs from the known text: expected SHA-256 {}, found {}; the file's is used",
        source, name, hash, found);
}

ChatText read_string(std::string_view python_source, const std::string& source, std::string_view name,
                     std::string_view hash) {
  try {
    const auto constant = find_python_constant(python_source, name, source);
    if (!constant) return {"", fmt::format("{}: {}: missing", source, name)};
    const auto* text = std::get_if<std::string>(&*constant);
    if (text == nullptr) return {"", fmt::format("{}: {}: expected a string, found a dict", source, name)};
    warn_if_changed(source, name, *text, hash);
    return {*text, ""};
  } catch (const Error& error) {
    return {"", error.what()};
  }
}

void read_efforts(std::string_view python_source, const std::string& source, ChatTexts& texts) {
  constexpr std::string_view kLevels = "REASONING_EFFORT_PROMPTS";
  try {
    if (const auto constant = find_python_constant(python_source, kLevels, source)) {
      const auto* levels = std::get_if<PythonDict>(&*constant);
      if (levels == nullptr) throw_bad_input("{}: {}: expected a dict, found a string", source, kLevels);
      texts.effort_prefixes = {levels->begin(), levels->end()};
      return;
    }
  } catch (const Error& error) {
    texts.effort_problem = error.what();
    return;
  }
  const ChatText preview = read_string(python_source, source, "REASONING_EFFORT_MAX", kEffortHash);
  texts.effort_problem = preview.problem;
  if (preview.problem.empty()) texts.effort_prefixes = {{"high", ""}, {"max", preview.value}};
}

}  // namespace

const std::string& ChatText::require() const {
  if (!problem.empty()) throw_bad_input("{}", problem);
  return value;
}

const std::string& ChatTexts::effort_prefix(const std::string& level) const {
  static const std::string kNothing;
  if (level.empty() || level == "none") return kNothing;
  if (!effort_problem.empty()) throw_bad_input("reasoning effort \"{}\": {}", level, effort_problem);
  const auto found = effort_prefixes.find(level);
  if (found == effort_prefixes.end()) {
    std::string known = "none";
    for (const auto& [name, prefix] : effort_prefixes) known += ", " + name;
    throw_bad_input("reasoning effort: expected one of {}, found \"{}\"", known, level);
  }
  return found->second;
}

ChatTexts ChatTexts::parse(std::string_view python_source, const std::string& source) {
  ChatTexts texts;
  texts.tools_template = read_string(python_source, source, "TOOLS_TEMPLATE", kToolsTemplateHash);
  texts.response_format_template = read_string(python_source, source, "response_format_template", kResponseFormatHash);
  read_efforts(python_source, source, texts);
  return texts;
}

ChatTexts ChatTexts::load(const std::string& checkpoint_dir) {
  const std::string path = (std::filesystem::path(checkpoint_dir) / "encoding" / "encoding_dsv4.py").string();
  if (std::filesystem::exists(path)) return parse(read_text_file(path, kMaxFileBytes), path);
  const std::string problem =
      fmt::format("{}: missing; tools, response formats and reasoning efforts need the texts of this file", path);
  return {{"", problem}, {"", problem}, {}, problem};
}

}  // namespace dsv4
