// The model's output to a message: reasoning, content, tool calls. Strict: the format or an error, nothing is repaired.
//
// Spec section 8.7. The output starts behind the prompt's <think> or </think> and ends with EOS as text.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "text/chat_encoding.h"

namespace dsv4 {

struct ParsedToolCall {
  std::string name;
  std::string arguments;  // a JSON object; values with string="false" stand in it as the model wrote them, unchecked
};

struct ParsedCompletion {
  std::string reasoning;
  std::string content;
  std::vector<ParsedToolCall> tool_calls;
};

// Throws bad input naming the byte position and what was expected there. EOS may be absent after a tool block only.
ParsedCompletion parse_completion(std::string_view text, ThinkingMode mode);

// The same for text that arrives in pieces: reasoning and content are handed out as soon as they are certain, tool calls
// at the end.
class CompletionStream {
 public:
  explicit CompletionStream(ThinkingMode mode);

  struct Delta {
    std::string reasoning;
    std::string content;
  };
  // Any cut of the text is fine. Throws once the text can no longer be well formed up to the tool block.
  Delta push(std::string_view text);
  // The whole completion: the concatenated deltas and the tool calls.
  ParsedCompletion finish() const;

 private:
  enum class Part { kReasoning, kContent, kRest };
  ThinkingMode mode_;
  Part part_;
  std::string text_;       // everything so far
  size_t handed_out_ = 0;  // bytes of text_ that went into deltas or are markers
};

}  // namespace dsv4
