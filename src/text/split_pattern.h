// One regular expression of a tokenizer.json pre-tokenizer, written for Oniguruma and run by PCRE2.
//
// Only constructs that mean the same in both are accepted, after three rewrites: \s and \d become Unicode properties
// (PCRE2's own \s also takes U+180E) and \uHHHH becomes \x{HHHH}. Everything else (\w, \b, ^, $, scripts, nested classes,
// option groups, possessive intervals) is refused by name rather than matched differently.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace dsv4 {

struct TextRange {
  size_t begin;
  size_t end;
};

class SplitPattern {
 public:
  // where: file and key, for errors.
  SplitPattern(std::string_view pattern, const std::string& where);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;

  // Per-thread working memory of find().
  class Matcher {
   public:
    explicit Matcher(const SplitPattern& pattern);
    ~Matcher();
    Matcher(Matcher&&) noexcept;
    Matcher& operator=(Matcher&&) noexcept;

    // First match at or after from; false if there is none. text is valid UTF-8, from a character boundary.
    // Throws bad input when the pattern exceeds its match limit on this text.
    bool find(std::string_view text, size_t from, TextRange& match);

   private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The PCRE2 form of an Oniguruma pattern; throws bad input for constructs whose meaning differs. Exposed for tests.
std::string translate_split_pattern(std::string_view pattern, const std::string& where);

}  // namespace dsv4
