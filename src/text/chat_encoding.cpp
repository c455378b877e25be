// Implementation of text/chat_encoding.h: merge and sort tool results, drop old reasoning, render message by message.
#include "text/chat_encoding.h"

#include <algorithm>
#include <map>

#include "base/check.h"
#include "text/special_tokens.h"

namespace dsv4 {
namespace {

// A message after merging: tool results and user texts of one user turn are blocks of it.
struct Turn {
  struct Block {
    std::string text;
    bool is_tool_result;
    std::string tool_call_id;
  };
  Message message;
  std::vector<Block> blocks;  // user turns only

  bool opens_assistant_turn() const { return message.role == Role::kUser || message.role == Role::kDeveloper; }
};

std::string_view role_name(Role role) {
  constexpr std::string_view kNames[] = {"system", "user", "developer", "latest_reminder", "assistant", "tool"};
  return kNames[static_cast<int>(role)];
}

std::string_view task_token(ChatTask task) {
  constexpr std::string_view kTokens[] = {"<｜action｜>", "<｜query｜>", "<｜authority｜>",
                                          "<｜domain｜>", "<｜title｜>", "<｜read_url｜>"};
  return kTokens[static_cast<int>(task)];
}

void check_message(const Message& message, size_t index) {
  const auto refuse = [&](std::string_view what) {
    throw_bad_input("message {} ({}): {}", index, role_name(message.role), what);
  };
  const bool has_sections = message.role == Role::kSystem || message.role == Role::kDeveloper;
  if (!message.tools.empty() && !has_sections) refuse("tools belong to a system or developer message");
  if (message.response_format && !has_sections) refuse("a response format belongs to a system or developer message");
  if (!message.tool_calls.empty() && message.role != Role::kAssistant)
    refuse("tool calls belong to an assistant message");
  if (!message.reasoning.empty() && message.role != Role::kAssistant)
    refuse("reasoning belongs to an assistant message");
  if (message.task && message.role == Role::kTool) refuse("a tool result cannot carry a task");
  if (message.role == Role::kDeveloper && message.content.empty()) refuse("expected content, found none");
  for (const OrderedJson& tool : message.tools)
    if (!tool.is_object()) refuse(fmt::format("expected tools as function objects, found {}", tool.dump()));
}

std::vector<Turn> merge_tool_results(std::span<const Message> messages, size_t first_index) {
  std::vector<Turn> turns;
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    check_message(message, first_index + i);
    Turn* open = !turns.empty() && turns.back().message.role == Role::kUser ? &turns.back() : nullptr;
    if (message.role == Role::kTool) {
      if (open == nullptr) open = &turns.emplace_back(Turn{Message{.role = Role::kUser}, {}});
      open->blocks.push_back({message.content, true, message.tool_call_id});
    } else if (message.role == Role::kUser && open != nullptr && !open->message.task) {
      if (message.task)
        throw_bad_input("message {} (user): joins the user turn before it, which would lose its task", first_index + i);
      open->blocks.push_back({message.content, false, ""});
    } else {
      turns.push_back({message, {}});
      if (message.role == Role::kUser) turns.back().blocks.push_back({message.content, false, ""});
    }
  }
  return turns;
}

// Results take the order of the calls they answer; texts between them stay where they are.
void sort_tool_results(std::vector<Turn>& turns) {
  std::map<std::string, size_t> call_order;
  for (Turn& turn : turns) {
    if (!turn.message.tool_calls.empty()) {
      call_order.clear();
      for (size_t i = 0; i < turn.message.tool_calls.size(); ++i)
        if (!turn.message.tool_calls[i].id.empty()) call_order[turn.message.tool_calls[i].id] = i;
    }
    if (call_order.empty()) continue;
    const auto order = [&](const Turn::Block& block) {
      const auto found = call_order.find(block.tool_call_id);
      return found == call_order.end() ? 0 : found->second;  // unknown ids count as the first call
    };
    std::vector<Turn::Block> results;
    for (const Turn::Block& block : turn.blocks)
      if (block.is_tool_result) results.push_back(block);
    std::stable_sort(results.begin(), results.end(), [&](const auto& a, const auto& b) { return order(a) < order(b); });
    auto next = results.begin();
    for (Turn::Block& block : turn.blocks)
      if (block.is_tool_result) block = *next++;
  }
}

// -1 if there is none.
ptrdiff_t last_user_index(const std::vector<Turn>& turns) {
  for (auto i = static_cast<ptrdiff_t>(turns.size()) - 1; i >= 0; --i)
    if (turns[static_cast<size_t>(i)].opens_assistant_turn()) return i;
  return -1;
}

// Before the last user turn: reasoning goes, developer messages go whole. first: the first turn to render, kept up to date.
std::vector<Turn> drop_old_thinking(const std::vector<Turn>& turns, size_t& first) {
  const ptrdiff_t last_user = last_user_index(turns);
  std::vector<Turn> kept;
  const size_t num_context = first;
  for (size_t i = 0; i < turns.size(); ++i) {
    const bool old = static_cast<ptrdiff_t>(i) < last_user;
    if (old && turns[i].message.role == Role::kDeveloper) {
      first -= i < num_context;
      continue;
    }
    kept.push_back(turns[i]);
    if (old) kept.back().message.reasoning.clear();
  }
  return kept;
}

class PromptWriter {
 public:
  void special(std::string_view token) { prompt_.segments.push_back({std::string(token), true}); }
  void text(std::string_view text) {
    if (text.empty()) return;
    if (prompt_.segments.empty() || prompt_.segments.back().is_special) prompt_.segments.push_back({"", false});
    prompt_.segments.back().text += text;
  }
  // <｜DSML｜name or </｜DSML｜name
  void dsml(std::string_view open, std::string_view name) {
    text(open);
    special(kDsmlToken);
    text(name);
  }
  Prompt take() { return std::move(prompt_); }

 private:
  Prompt prompt_;
};

class ChatRenderer {
 public:
  ChatRenderer(const std::vector<Turn>& turns, const ChatOptions& options, bool drop_thinking, const ChatTexts& texts)
      : turns_(turns),
        texts_(texts),
        thinking_(options.mode == ThinkingMode::kThinking),
        drop_thinking_(drop_thinking),
        effort_prefix_(thinking_ ? texts.effort_prefix(options.reasoning_effort) : ""),
        last_user_(last_user_index(turns)) {}

  void bos() { out_.special(kBosToken); }
  Prompt take() { return out_.take(); }

  void render(size_t index) {
    const Message& message = turns_[index].message;
    if (index == 0) out_.text(effort_prefix_);
    switch (message.role) {
      case Role::kSystem:
        out_.text(message.content);
        sections(message);
        break;
      case Role::kDeveloper:
        out_.special(kUserToken);
        out_.text(message.content);
        sections(message);
        break;
      case Role::kUser:
        user(turns_[index]);
        break;
      case Role::kLatestReminder:
        out_.special(kLatestReminderToken);
        out_.text(message.content);
        break;
      case Role::kAssistant:
        assistant(index);
        break;
      case Role::kTool:
        DSV4_CHECK(false, "tool message {} was not merged", index);
    }
    transition(index);
  }

 private:
  void user(const Turn& turn) {
    out_.special(kUserToken);
    for (size_t i = 0; i < turn.blocks.size(); ++i) {
      if (i > 0) out_.text("\n\n");
      const Turn::Block& block = turn.blocks[i];
      if (block.is_tool_result) out_.text("<tool_result>");
      out_.text(block.text);
      if (block.is_tool_result) out_.text("</tool_result>");
    }
  }

  void assistant(size_t index) {
    const Message& message = turns_[index].message;
    const bool answers_task = index > 0 && turns_[index - 1].message.task.has_value();
    if (thinking_ && !answers_task && (!drop_thinking_ || static_cast<ptrdiff_t>(index) > last_user_)) {
      out_.text(message.reasoning);
      out_.special(kEndThinkToken);
    }
    out_.text(message.content);
    if (!message.tool_calls.empty()) tool_calls(message, index);
    if (!message.without_eos) out_.special(kEosToken);
  }

  void tool_calls(const Message& message, size_t index) {
    out_.text("\n\n");
    out_.dsml("<", "tool_calls>\n");
    for (const ToolCall& call : message.tool_calls) {
      out_.dsml("<", fmt::format("invoke name=\"{}\">\n", call.name));
      arguments(call, index);
      out_.text("\n");
      out_.dsml("</", "invoke>\n");
    }
    out_.dsml("</", "tool_calls>");
  }

  void arguments(const ToolCall& call, size_t index) {
    OrderedJson object;
    try {
      object = parse_ordered_json(call.arguments, "arguments");
    } catch (const Error&) {
      object = {{"arguments", call.arguments}};  // the format's own rule for text that is not JSON
    }
    if (!object.is_object())
      throw_bad_input("message {} (assistant): arguments of the call of \"{}\": expected a JSON object, found {}{}",
                      index, call.name, object.type_name(), object.is_string() ? " (JSON encoded twice?)" : "");
    bool first = true;
    for (const auto& [name, value] : object.items()) {
      if (!first) out_.text("\n");
      first = false;
      const bool is_string = value.is_string();
      out_.dsml("<", fmt::format("parameter name=\"{}\" string=\"{}\">", name, is_string));
      out_.text(is_string ? value.get_ref<const std::string&>() : python_json(value));
      out_.dsml("</", "parameter>");
    }
  }

  // Tools and response format follow the content of a system or developer message.
  void sections(const Message& message) {
    if (!message.tools.empty()) {
      std::string schemas;
      for (const OrderedJson& tool : message.tools) {
        if (!schemas.empty()) schemas += '\n';
        schemas += python_json(tool);
      }
      out_.text("\n\n");
      formatted(texts_.tools_template.require(), "tool_schemas", schemas);
    }
    if (message.response_format) {
      out_.text("\n\n");
      formatted(texts_.response_format_template.require(), "schema", python_json(*message.response_format));
    }
  }

  // Python's str.format with one value and the token placeholders.
  void formatted(std::string_view format, std::string_view value_name, std::string_view value) {
    while (!format.empty()) {
      const size_t plain = std::min(format.find_first_of("{}"), format.size());
      out_.text(format.substr(0, plain));
      format.remove_prefix(plain);
      if (format.empty()) return;
      if (format.starts_with("{{") || format.starts_with("}}")) {
        out_.text(format.substr(0, 1));
        format.remove_prefix(2);
        continue;
      }
      const size_t close = format.find('}');
      const std::string_view name = format.substr(1, close == std::string_view::npos ? close : close - 1);
      if (format[0] == '{' && name == value_name) {
        out_.text(value);
      } else if (format[0] == '{' && name == "dsml_token") {
        out_.special(kDsmlToken);
      } else if (format[0] == '{' && name == "thinking_start_token") {
        out_.special(kThinkToken);
      } else if (format[0] == '{' && name == "thinking_end_token") {
        out_.special(kEndThinkToken);
      } else {
        throw_bad_input("encoding_dsv4.py: unknown placeholder \"{}\" in a prompt text", format.substr(0, 40));
      }
      format.remove_prefix(close + 1);
    }
  }

  // What stands between a message and the assistant's next words.
  void transition(size_t index) {
    if (index + 1 < turns_.size()) {
      const Role next = turns_[index + 1].message.role;
      if (next != Role::kAssistant && next != Role::kLatestReminder) return;
    }
    const Turn& turn = turns_[index];
    if (turn.message.task) {
      if (turn.message.task == ChatTask::kAction) {
        out_.special(kAssistantToken);
        out_.special(thinking_ ? kThinkToken : kEndThinkToken);
      }
      out_.special(task_token(*turn.message.task));
    } else if (turn.opens_assistant_turn()) {
      out_.special(kAssistantToken);
      const bool think = thinking_ && (!drop_thinking_ || static_cast<ptrdiff_t>(index) >= last_user_);
      out_.special(think ? kThinkToken : kEndThinkToken);
    }
  }

  const std::vector<Turn>& turns_;
  const ChatTexts& texts_;
  bool thinking_;
  bool drop_thinking_;
  std::string effort_prefix_;
  ptrdiff_t last_user_;
  PromptWriter out_;
};

}  // namespace

Prompt encode_chat(std::span<const Message> messages, const ChatOptions& options, const ChatTexts& texts,
                   std::span<const Message> context) {
  std::vector<Turn> turns = merge_tool_results(context, 0);
  size_t first = turns.size();
  for (Turn& turn : merge_tool_results(messages, context.size())) turns.push_back(std::move(turn));
  sort_tool_results(turns);

  const bool any_tools =
      std::any_of(turns.begin(), turns.end(), [](const Turn& turn) { return !turn.message.tools.empty(); });
  const bool drop_thinking = options.drop_thinking && !any_tools;
  if (drop_thinking && options.mode == ThinkingMode::kThinking) turns = drop_old_thinking(turns, first);
  ChatRenderer renderer(turns, options, drop_thinking, texts);
  if (options.add_bos && context.empty()) renderer.bos();
  for (size_t i = first; i < turns.size(); ++i) renderer.render(i);
  return renderer.take();
}

std::string Prompt::text() const {
  std::string text;
  for (const PromptSegment& segment : segments) text += segment.text;
  return text;
}

std::vector<TokenId> Prompt::encode(const Tokenizer& tokenizer) const {
  std::vector<TokenId> ids;
  std::string run;
  const auto flush = [&] {
    const auto run_ids = tokenizer.encode(run, false);
    ids.insert(ids.end(), run_ids.begin(), run_ids.end());
    run.clear();
  };
  for (const PromptSegment& segment : segments) {
    const auto id = segment.is_special ? tokenizer.token_id(segment.text) : std::nullopt;
    if (id) {
      flush();
      ids.push_back(*id);
    } else {
      run += segment.text;
    }
  }
  flush();
  return ids;
}

}  // namespace dsv4
