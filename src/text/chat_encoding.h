// Messages to prompt: turns, reasoning, tools and tool results as DeepSeek-V4 was trained on them. Spec section 8.2-8.6.
//
// A prompt is a list of segments: special tokens, which only this encoder writes, and text, which never yields a special
// token whatever a user, a tool or a model wrote in it. docs/formats/chat.md shows the layout.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat_texts.h"
#include "text/python_json.h"
#include "text/tokenizer.h"

namespace dsv4 {

enum class ThinkingMode { kChat, kThinking };

enum class Role { kSystem, kUser, kDeveloper, kLatestReminder, kAssistant, kTool };

// Internal single-purpose requests of the model (spec 8.6).
enum class ChatTask { kAction, kQuery, kAuthority, kDomain, kTitle, kReadUrl };

struct ToolCall {
  std::string id;         // pairs results with calls; may be empty
  std::string name;       //
  std::string arguments;  // JSON text of an object, encoded once
};

struct Message {
  Role role = Role::kUser;
  std::string content = {};
  std::string reasoning = {};                       // assistant
  std::vector<ToolCall> tool_calls = {};            // assistant
  std::string tool_call_id = {};                    // tool: the call this answers
  std::vector<OrderedJson> tools = {};              // system, developer: the inner "function" objects
  std::optional<OrderedJson> response_format = {};  // system, developer: a JSON schema
  std::optional<ChatTask> task = {};                //
  bool without_eos = false;                         // assistant: the turn goes on
};

struct ChatOptions {
  ThinkingMode mode = ThinkingMode::kChat;
  bool drop_thinking = true;          // no reasoning of earlier turns; off by itself when a message carries tools
  bool add_bos = true;                // only when there is no context
  std::string reasoning_effort = {};  // ChatTexts::effort_prefix; thinking mode only
};

struct PromptSegment {
  std::string text;
  bool is_special;  // text is one special token
};

struct Prompt {
  std::vector<PromptSegment> segments;  // no two neighbours are both text; none is empty

  std::string text() const;
  // Special segments become their token if the tokenizer has it, ordinary text if not. Text runs are encoded whole, so
  // that ids equal those of text() unless a message holds the text of an added token.
  std::vector<TokenId> encode(const Tokenizer& tokenizer) const;
};

// context: messages before these that are encoded already; they are not rendered, but decide what is dropped.
// Throws bad input naming the message.
Prompt encode_chat(std::span<const Message> messages, const ChatOptions& options, const ChatTexts& texts,
                   std::span<const Message> context = {});

}  // namespace dsv4
