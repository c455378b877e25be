// Implementation of text/chat_parser.h: one pass with a position that errors can name.
#include "text/chat_parser.h"

#include <algorithm>
#include <array>
#include <set>

#include "base/check.h"
#include "text/python_json.h"
#include "text/special_tokens.h"
#include "text/stop_strings.h"
#include "text/utf8.h"

namespace dsv4 {
namespace {

const std::string kDsml(kDsmlToken);
const std::string kToolBlock = "\n\n<" + kDsml + "tool_calls";
const std::string kToolBlockEnd = "</" + kDsml + "tool_calls>";
const std::string kInvoke = "<" + kDsml + "invoke";
const std::string kInvokeEnd = "</" + kDsml + "invoke";
const std::string kParameter = "<" + kDsml + "parameter";
const std::string kParameterEnd = "/" + kDsml + "parameter";  // behind a "<"

constexpr std::array<std::string_view, 5> kForbidden = {kBosToken, kEosToken, kThinkToken, kEndThinkToken, kDsmlToken};

[[noreturn]] void fail(size_t position, std::string_view text, std::string_view expected) {
  constexpr size_t kQuotedBytes = 60;
  std::string_view rest = text.substr(std::min(position, text.size()), kQuotedBytes);
  rest = rest.substr(0, valid_utf8_prefix(rest));
  throw_bad_input("completion: byte {}: expected {}, found {}", position, expected,
                  position >= text.size() ? "the end" : python_json_string(rest));
}

// text[begin, end) goes to the user: it must be free of markup.
void refuse_special_tokens(std::string_view text, size_t begin, size_t end) {
  for (const std::string_view token : kForbidden) {
    const size_t found = text.substr(begin, end - begin).find(token);
    if (found != std::string_view::npos) fail(begin + found, text, "text without special tokens");
  }
}

class CompletionParser {
 public:
  CompletionParser(std::string_view text, ThinkingMode mode) : text_(text), mode_(mode) {}

  ParsedCompletion run() {
    ParsedCompletion out;
    if (mode_ == ThinkingMode::kThinking) {
      const size_t end = std::min(text_.find(kEndThinkToken), text_.find(kToolBlock));
      if (end == std::string_view::npos || !text_.substr(end).starts_with(kEndThinkToken))
        fail(std::min(end, text_.size()), text_, "</think> at the end of the reasoning");
      out.reasoning = plain_until(end);
      at_ += kEndThinkToken.size();
    }
    const size_t end = std::min(text_.find(kEosToken, at_), text_.find(kToolBlock, at_));
    if (end == std::string_view::npos) fail(text_.size(), text_, "EOS or a tool block at the end of the content");
    out.content = plain_until(end);
    if (text_.substr(at_).starts_with(kToolBlock)) {
      at_ += kToolBlock.size();
      tool_block(out.tool_calls);
      if (at_ == text_.size()) return out;
    }
    take(kEosToken);
    if (at_ != text_.size()) fail(at_, text_, "nothing after EOS");
    return out;
  }

 private:
  std::string plain_until(size_t end) {
    refuse_special_tokens(text_, at_, end);
    const size_t begin = at_;
    at_ = end;
    return std::string(text_.substr(begin, end - begin));
  }

  bool accept(std::string_view token) {
    if (!text_.substr(at_).starts_with(token)) return false;
    at_ += token.size();
    return true;
  }
  void take(std::string_view token) {
    if (!accept(token)) fail(at_, text_, python_json_string(token));
  }

  void tool_block(std::vector<ParsedToolCall>& calls) {
    take(">\n");
    while (!accept(kToolBlockEnd)) {
      if (!accept(kInvoke)) fail(at_, text_, "an invoke or the end of the tool block");
      calls.push_back(invoke());
      take(">\n");
    }
  }

  // Behind "<｜DSML｜invoke", up to behind "</｜DSML｜invoke".
  ParsedToolCall invoke() {
    while (at_ < text_.size() && std::string_view(" \t\n\r\f\v").find(text_[at_]) != std::string_view::npos) ++at_;
    take("name=\"");
    // The name ends where the tag does; without arguments an empty line follows.
    const size_t invoke_end = text_.find(kInvokeEnd, at_);
    if (invoke_end == std::string_view::npos) fail(text_.size(), text_, "the end of the invoke");
    std::string_view header = text_.substr(at_, invoke_end - at_);
    header = header.substr(0, header.find(kParameter));
    const size_t end = at_ + header.size();
    if (header.ends_with("\">\n\n")) header.remove_suffix(1);
    if (!header.ends_with("\">\n")) fail(end, text_, "\"\\\">\\n\" at the end of the invoke tag before this");
    ParsedToolCall call{std::string(header.substr(0, header.size() - 3)), "{"};
    at_ = end;

    std::set<std::string> names;
    while (!accept(kInvokeEnd)) {
      if (!accept(kParameter)) fail(at_, text_, "a parameter or the end of the invoke");
      parameter(names, call.arguments);
      take(">\n");
    }
    call.arguments += "}";
    return call;
  }

  // Behind "<｜DSML｜parameter", up to behind "</｜DSML｜parameter".
  void parameter(std::set<std::string>& names, std::string& arguments) {
    static const std::string kString = "\" string=\"true\">";
    static const std::string kNoString = "\" string=\"false\">";
    const size_t start = at_;
    take(" name=\"");
    const size_t end = text_.find(kParameterEnd, at_);
    if (end == std::string_view::npos) fail(text_.size(), text_, "the end of the parameter");
    if (end == at_ || text_[end - 1] != '<') fail(end, text_, "\"<\" before the end of the parameter");
    const std::string_view body = text_.substr(at_, end - 1 - at_);
    const size_t string_at = body.find(kString), no_string_at = body.find(kNoString);
    const size_t name_end = std::min(string_at, no_string_at);
    if (name_end == std::string_view::npos)
      fail(start, text_, "a parameter tag ' name=\"...\" string=\"true|false\">'");
    const bool is_string = name_end == string_at;
    const std::string name(body.substr(0, name_end));
    if (!names.insert(name).second) fail(start, text_, "a parameter name that is new in this call");
    const std::string_view value = body.substr(name_end + (is_string ? kString : kNoString).size());
    if (names.size() > 1) arguments += ", ";
    arguments += python_json_string(name) + ": ";
    arguments += is_string ? python_json_string(value) : std::string(value);
    at_ = end + kParameterEnd.size();
  }

  std::string_view text_;
  ThinkingMode mode_;
  size_t at_ = 0;
};

}  // namespace

ParsedCompletion parse_completion(std::string_view text, ThinkingMode mode) {
  return CompletionParser(text, mode).run();
}

CompletionStream::CompletionStream(ThinkingMode mode)
    : mode_(mode), part_(mode == ThinkingMode::kThinking ? Part::kReasoning : Part::kContent) {}

CompletionStream::Delta CompletionStream::push(std::string_view text) {
  static const std::vector<std::string> kMarkers = [] {
    std::vector<std::string> markers(kForbidden.begin(), kForbidden.end());
    markers.push_back(kToolBlock);
    return markers;
  }();
  text_ += text;
  Delta delta;
  while (part_ != Part::kRest) {
    // The markers that end this part; any other one inside it is an error.
    const bool reasoning = part_ == Part::kReasoning;
    const size_t own_end = text_.find(reasoning ? kEndThinkToken : kEosToken, handed_out_);
    const size_t end = std::min(own_end, text_.find(kToolBlock, handed_out_));
    const bool ended = end != std::string::npos;
    const size_t ready =
        ended ? end : text_.size() - held_back_bytes(std::string_view(text_).substr(handed_out_), kMarkers);
    refuse_special_tokens(text_, handed_out_, ready);
    (reasoning ? delta.reasoning : delta.content) += text_.substr(handed_out_, ready - handed_out_);
    handed_out_ = ready;
    if (!ended) break;
    if (reasoning && end != own_end) fail(end, text_, "</think> at the end of the reasoning");
    if (reasoning) handed_out_ += kEndThinkToken.size();
    part_ = reasoning ? Part::kContent : Part::kRest;
  }
  return delta;
}

ParsedCompletion CompletionStream::finish() const { return parse_completion(text_, mode_); }

}  // namespace dsv4
