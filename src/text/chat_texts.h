// The fixed English texts of the prompt format, which belong to the checkpoint: encoding/encoding_dsv4.py.
//
// The file is read, never run. A checkpoint without it still chats; what needs a missing text (tools, a response format,
// a reasoning effort) is then refused with the file's name.
#pragma once

#include <map>
#include <string>
#include <string_view>

namespace dsv4 {

// One constant of the file, or why there is none.
struct ChatText {
  std::string value;
  std::string problem;  // empty = value is good

  // Throws bad input with the problem.
  const std::string& require() const;
};

struct ChatTexts {
  ChatText tools_template;            // Python format string with {tool_schemas} and token placeholders
  ChatText response_format_template;  // Python format string with {schema}
  // Prefix by effort level. The preview files have one text for "max"; the later ones name every level.
  std::map<std::string, std::string> effort_prefixes;
  std::string effort_problem;  // why effort_prefixes is empty

  // The prefix of a level; "" and "none" are the default, which prints nothing. Throws bad input for unknown levels.
  const std::string& effort_prefix(const std::string& level) const;

  // Texts that differ from the ones known by hash are used, with a warning in the log.
  static ChatTexts load(const std::string& checkpoint_dir);
  static ChatTexts parse(std::string_view python_source, const std::string& source);
};

}  // namespace dsv4
