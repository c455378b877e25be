// Implementation of text/split_pattern.h.
#include "text/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <utility>

#include "base/check.h"

namespace dsv4 {
namespace {

constexpr size_t kMaxPatternBytes = 16 << 10;
// Backtracking steps of one match. DeepSeek's patterns need about one per character of a white-space run.
constexpr uint32_t kMatchLimit = 20'000'000;
constexpr uint32_t kHeapLimitKib = 64 << 10;
constexpr size_t kMaxJitStackBytes = 8 << 20;

constexpr std::array<std::string_view, 37> kGeneralCategories = {
    "L",  "Ll", "Lm", "Lo", "Lt", "Lu", "M",  "Mc", "Me", "Mn", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Pe", "Pf",
    "Pi", "Po", "Ps", "S",  "Sc", "Sk", "Sm", "So", "Z",  "Zl", "Zp", "Zs", "C",  "Cc", "Cf", "Cn", "Co", "Cs"};

bool is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_ascii_punctuation(char c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

class PatternTranslator {
 public:
  PatternTranslator(std::string_view pattern, const std::string& where) : pattern_(pattern), where_(where) {}

  std::string run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape();
      } else if (c == '[') {
        character_class();
      } else if (c == '(') {
        group_start();
      } else if (c == '{') {
        interval();
      } else if (c == '^' || c == '$') {
        refuse(1);
      } else {
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  char peek(size_t ahead) const { return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0'; }

  void copy(size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }
  void replace(size_t count, std::string_view text) {
    out_ += text;
    at_ += count;
  }
  [[noreturn]] void refuse(size_t count) const {
    throw_bad_input("{}: unsupported construct \"{}\" at byte {} of the split pattern \"{}\"", where_,
                    pattern_.substr(at_, count), at_, pattern_);
  }

  void escape() {
    const char c = peek(1);
    switch (c) {
      case 'p':
      case 'P': {
        const size_t close = pattern_.find('}', at_);
        if (peek(2) != '{' || close == std::string_view::npos) refuse(3);
        const std::string_view name = pattern_.substr(at_ + 3, close - at_ - 3);
        bool known = false;
        for (const std::string_view category : kGeneralCategories) known |= category == name;
        if (!known) refuse(close + 1 - at_);
        copy(close + 1 - at_);
        return;
      }
      case 's':
        return replace(2, "\\p{White_Space}");
      case 'S':
        return replace(2, "\\P{White_Space}");
      case 'd':
        return replace(2, "\\p{Nd}");
      case 'D':
        return replace(2, "\\P{Nd}");
      case 'r':
      case 'n':
      case 't':
        return copy(2);
      case 'u': {
        for (size_t i = 2; i < 6; ++i)
          if (!is_hex(peek(i))) refuse(6);
        const std::string code_point(pattern_.substr(at_ + 2, 4));
        return replace(6, "\\x{" + code_point + "}");
      }
      case 'x': {
        size_t end = 3;
        while (is_hex(peek(end))) ++end;
        if (peek(2) != '{' || peek(end) != '}' || end == 3 || end > 9) refuse(3);
        return copy(end + 1);
      }
      default:
        if (!is_ascii_punctuation(c)) refuse(2);
        return copy(2);
    }
  }

  void character_class() {
    copy(1);
    if (peek(0) == '^') copy(1);
    if (peek(0) == ']') refuse(1);
    while (at_ < pattern_.size() && peek(0) != ']') {
      if (peek(0) == '\\') {
        escape();
      } else if (peek(0) == '[' || (peek(0) == '&' && peek(1) == '&')) {
        refuse(2);
      } else {
        copy(1);
      }
    }
    copy(1);  // an unterminated class is PCRE2's error
  }

  void group_start() {
    if (peek(1) == '*') refuse(2);
    if (peek(1) != '?') return copy(1);
    for (const std::string_view prefix : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!"})
      if (pattern_.substr(at_).starts_with(prefix)) return copy(prefix.size());
    refuse(4);
  }

  void interval() {
    size_t end = 1;
    if (!is_digit(peek(end))) refuse(2);
    while (is_digit(peek(end))) ++end;
    if (peek(end) == ',') ++end;
    while (is_digit(peek(end))) ++end;
    if (peek(end) != '}' || peek(end + 1) == '+') refuse(end + 2);
    copy(end + 1);
  }

  std::string_view pattern_;
  const std::string& where_;
  size_t at_ = 0;
  std::string out_;
};

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

template <class T, void (*kFree)(T*)>
struct Deleter {
  void operator()(T* object) const { kFree(object); }
};
template <class T, void (*kFree)(T*)>
using Handle = std::unique_ptr<T, Deleter<T, kFree>>;

template <class T>
T* checked(T* object) {
  if (object == nullptr) throw_resource("out of memory in PCRE2");
  return object;
}

}  // namespace

std::string translate_split_pattern(std::string_view pattern, const std::string& where) {
  if (pattern.empty() || pattern.size() > kMaxPatternBytes)
    throw_bad_input("{}: split pattern of {} bytes, expected 1 to {}", where, pattern.size(), kMaxPatternBytes);
  return PatternTranslator(pattern, where).run();
}

struct SplitPattern::Impl {
  Handle<pcre2_code, pcre2_code_free> code;
  std::string where;
  std::string pattern;
};

SplitPattern::SplitPattern(std::string_view pattern, const std::string& where) : impl_(std::make_unique<Impl>()) {
  const std::string translated = translate_split_pattern(pattern, where);
  Handle<pcre2_compile_context, pcre2_compile_context_free> context(checked(pcre2_compile_context_create(nullptr)));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // what "." stops at, as in Oniguruma
  pcre2_set_parens_nest_limit(context.get(), 50);
  int code = 0;
  PCRE2_SIZE offset = 0;
  impl_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &offset, context.get()));
  if (impl_->code == nullptr)
    throw_bad_input("{}: split pattern \"{}\" does not compile: {} (at byte {} of \"{}\")", where, pattern,
                    pcre2_message(code), offset, translated);
  uint32_t min_length = 0;
  pcre2_pattern_info(impl_->code.get(), PCRE2_INFO_MINLENGTH, &min_length);
  if (min_length == 0) throw_bad_input("{}: split pattern \"{}\" can match nothing", where, pattern);
  // Without a JIT for this processor pcre2_match() interprets: same result, slower.
  pcre2_jit_compile(impl_->code.get(), PCRE2_JIT_COMPLETE);
  impl_->where = where;
  impl_->pattern = std::string(pattern);
}

SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

struct SplitPattern::Matcher::Impl {
  const SplitPattern::Impl* pattern;
  Handle<pcre2_match_context, pcre2_match_context_free> context;
  Handle<pcre2_jit_stack, pcre2_jit_stack_free> stack;
  Handle<pcre2_match_data, pcre2_match_data_free> data;
};

SplitPattern::Matcher::Matcher(const SplitPattern& pattern) : impl_(std::make_unique<Impl>()) {
  impl_->pattern = pattern.impl_.get();
  impl_->context.reset(checked(pcre2_match_context_create(nullptr)));
  pcre2_set_match_limit(impl_->context.get(), kMatchLimit);
  pcre2_set_heap_limit(impl_->context.get(), kHeapLimitKib);
  impl_->stack.reset(pcre2_jit_stack_create(32 << 10, kMaxJitStackBytes, nullptr));  // null without JIT support
  pcre2_jit_stack_assign(impl_->context.get(), nullptr, impl_->stack.get());
  impl_->data.reset(checked(pcre2_match_data_create_from_pattern(impl_->pattern->code.get(), nullptr)));
}

SplitPattern::Matcher::~Matcher() = default;
SplitPattern::Matcher::Matcher(Matcher&&) noexcept = default;
SplitPattern::Matcher& SplitPattern::Matcher::operator=(Matcher&&) noexcept = default;

bool SplitPattern::Matcher::find(std::string_view text, size_t from, TextRange& match) {
  // The text was validated once by the caller; PCRE2 would do it again for every match.
  const int count = pcre2_match(impl_->pattern->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                from, PCRE2_NO_UTF_CHECK, impl_->data.get(), impl_->context.get());
  if (count == PCRE2_ERROR_NOMATCH) return false;
  if (count < 0)
    throw_bad_input("{}: split pattern \"{}\" fails on a text of {} bytes: {}", impl_->pattern->where,
                    impl_->pattern->pattern, text.size(), pcre2_message(count));
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(impl_->data.get());
  match = {bounds[0], bounds[1]};
  DSV4_CHECK(match.begin >= from && match.end >= match.begin && match.end <= text.size(),
             "match [{}, {}) from {} in {}", match.begin, match.end, from, text.size());
  // The length PCRE2 computes at compile time overlooks some look-arounds.
  if (match.end == match.begin)
    throw_bad_input("{}: split pattern \"{}\" can match nothing", impl_->pattern->where, impl_->pattern->pattern);
  return true;
}

}  // namespace dsv4
