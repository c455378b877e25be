// Stop strings in a stream of text: what may still become one is held back, so that no part of it is ever shown.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

// Bytes at the end of text that begin one of patterns without completing it: the longest such suffix.
size_t held_back_bytes(std::string_view text, std::span<const std::string> patterns);

// The match that ends first in the text wins (of several ending there, the longest), however the text is cut into pieces.
class StopStrings {
 public:
  // Each non-empty and valid UTF-8, so that cutting whole characters leaves whole characters. Throws usage errors.
  explicit StopStrings(std::vector<std::string> stops);

  // Returns the text that is certain to stand before any stop string. After a match: nothing more.
  std::string push(std::string_view text);
  // The end of the text: returns what was held back.
  std::string finish();

  const std::optional<std::string>& matched() const { return matched_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  std::optional<std::string> matched_;
};

}  // namespace dsv4
