// Implementation of text/python_constant.h: a scanner that knows strings, comments and brackets.
#include "text/python_constant.h"

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "text/utf8.h"

namespace dsv4 {
namespace {

bool is_identifier(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

class PythonScanner {
 public:
  PythonScanner(std::string_view text, std::string_view name, const std::string& source)
      : text_(text), name_(name), source_(source) {}

  std::optional<PythonConstant> run() {
    int depth = 0;
    while (at_ < text_.size()) {
      const bool line_start = at_ == 0 || text_[at_ - 1] == '\n';
      const char c = text_[at_];
      if (is_identifier(c)) {
        const std::string_view word = identifier();
        if (is_quote()) {
          string_body(word);  // word is a prefix
        } else if (line_start && depth == 0 && word == name_ && at_assignment()) {
          return value();
        }
      } else if (is_quote()) {
        string_body("");
      } else if (c == '#') {
        skip_comment();
      } else {
        depth += c == '(' || c == '[' || c == '{';
        depth -= c == ')' || c == ']' || c == '}';
        at_ += c == '\\' ? 2 : 1;  // a backslash joins lines
      }
    }
    return std::nullopt;
  }

 private:
  char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }
  bool is_quote() const { return peek() == '"' || peek() == '\''; }

  [[noreturn]] void fail(std::string_view expected) const {
    const auto line =
        1 + std::count(text_.begin(), text_.begin() + static_cast<ptrdiff_t>(std::min(at_, text_.size())), '\n');
    throw_bad_input("{}: line {}: {}: expected {}", source_, line, name_, expected);
  }

  std::string_view identifier() {
    const size_t start = at_;
    while (is_identifier(peek())) ++at_;
    return text_.substr(start, at_ - start);
  }
  void skip_comment() {
    while (at_ < text_.size() && text_[at_] != '\n') ++at_;
  }
  void skip_spaces() {
    while (peek() == ' ' || peek() == '\t') ++at_;
  }
  void skip_space_and_comments() {
    while (true) {
      if (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') {
        ++at_;
      } else if (peek() == '#') {
        skip_comment();
      } else {
        return;
      }
    }
  }

  // After the name: [": annotation"] "=" on the same line.
  bool at_assignment() {
    skip_spaces();
    if (peek() == ':')
      while (peek() != '=' && peek() != '\n' && at_ < text_.size()) ++at_;
    if (peek() != '=' || peek(1) == '=') return false;
    ++at_;
    skip_spaces();
    return true;
  }

  PythonConstant value() {
    PythonConstant constant;
    if (peek() == '{') {
      constant = dict();
    } else {
      constant = strings(false);
    }
    skip_spaces();
    if (peek() == '#') skip_comment();
    if (at_ < text_.size() && peek() != '\n' && peek() != '\r') fail("nothing after the literal");
    return constant;
  }

  // One or more neighbouring literals, or the same in parentheses. in_brackets: line ends do not count.
  std::string strings(bool in_brackets) {
    if (peek() == '(') {
      ++at_;
      skip_space_and_comments();
      std::string joined = literals(true);
      if (peek() != ')') fail("only string literals between ( and )");
      ++at_;
      return joined;
    }
    return literals(in_brackets);
  }

  std::string literals(bool in_brackets) {
    std::string joined;
    bool any = false;
    while (true) {
      const size_t start = at_;
      const std::string_view prefix = identifier();
      if (!is_quote()) {
        at_ = start;
        if (!any) fail("a string literal");
        return joined;
      }
      if (prefix.find_first_not_of("rRuU") != std::string_view::npos) fail("a plain string, not one with a prefix");
      joined += string_body(prefix);
      any = true;
      if (in_brackets) {
        skip_space_and_comments();
      } else {
        skip_spaces();
      }
    }
  }

  PythonDict dict() {
    PythonDict entries;
    ++at_;
    skip_space_and_comments();
    while (peek() != '}') {
      std::string key = literals(true);
      if (peek() != ':') fail("\":\" after a key");
      ++at_;
      skip_space_and_comments();
      entries.emplace_back(std::move(key), strings(true));
      skip_space_and_comments();
      if (peek() == ',') {
        ++at_;
        skip_space_and_comments();
      } else if (peek() != '}') {
        fail("\",\" or \"}\" after a value");
      }
    }
    ++at_;
    return entries;
  }

  // From the opening quote to behind the closing one.
  std::string string_body(std::string_view prefix) {
    const bool raw = prefix.find_first_of("rR") != std::string_view::npos;
    const char quote = peek();
    const bool triple = peek(1) == quote && peek(2) == quote;
    const std::string close(triple ? 3 : 1, quote);
    at_ += close.size();
    std::string out;
    while (text_.substr(at_, close.size()) != close) {
      if (at_ >= text_.size() || (!triple && peek() == '\n')) fail("a closing quote");
      if (peek() != '\\') {
        out.push_back(text_[at_++]);
      } else if (raw) {
        out.push_back(text_[at_++]);
        if (at_ < text_.size()) out.push_back(text_[at_++]);
      } else {
        escape(out);
      }
    }
    at_ += close.size();
    return out;
  }

  // Escapes that do not occur in constants (\N{...}) are kept as they stand, as Python does with unknown ones.
  void escape(std::string& out) {
    static constexpr std::string_view kNames = "\\'\"abfnrtv";
    static constexpr std::string_view kValues = "\\'\"\a\b\f\n\r\t\v";
    const char c = peek(1);
    if (const size_t known = kNames.find(c); c != '\0' && known != std::string_view::npos) {
      out.push_back(kValues[known]);
      at_ += 2;
    } else if (c == '\n') {
      at_ += 2;
    } else if (c == 'x' || c == 'u' || c == 'U') {
      at_ += 2;
      number(out, c == 'x' ? 2 : c == 'u' ? 4 : 8, 16);
    } else if (c >= '0' && c <= '7') {
      at_ += 1;
      int digits = 1;
      while (digits < 3 && peek(static_cast<size_t>(digits)) >= '0' && peek(static_cast<size_t>(digits)) <= '7')
        ++digits;
      number(out, digits, 8);
    } else {
      out.push_back('\\');
      ++at_;
      if (at_ < text_.size()) out.push_back(text_[at_++]);
    }
  }

  void number(std::string& out, int num_digits, uint32_t base) {
    uint32_t code_point = 0;
    for (int i = 0; i < num_digits; ++i, ++at_) {
      const char c = peek();
      const uint32_t digit = c >= '0' && c <= '9'   ? static_cast<uint32_t>(c - '0')
                             : c >= 'a' && c <= 'f' ? static_cast<uint32_t>(c - 'a' + 10)
                             : c >= 'A' && c <= 'F' ? static_cast<uint32_t>(c - 'A' + 10)
                                                    : base;
      if (digit >= base) fail("digits in an escape");
      code_point = code_point * base + digit;
    }
    if (code_point > 0x10FFFF || (code_point >= 0xD800 && code_point < 0xE000)) fail("a character in an escape");
    append_utf8(out, code_point);
  }

  std::string_view text_;
  std::string_view name_;
  const std::string& source_;
  size_t at_ = 0;
};

}  // namespace

std::optional<PythonConstant> find_python_constant(std::string_view text, std::string_view name,
                                                   const std::string& source) {
  return PythonScanner(text, name, source).run();
}

}  // namespace dsv4
