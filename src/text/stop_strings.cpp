// Implementation of text/stop_strings.h.
#include "text/stop_strings.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "text/utf8.h"

namespace dsv4 {

size_t held_back_bytes(std::string_view text, std::span<const std::string> patterns) {
  size_t held = 0;
  for (const std::string_view pattern : patterns) {
    for (size_t length = std::min(text.size(), pattern.size() - 1); length > held; --length) {
      if (text.ends_with(pattern.substr(0, length))) {
        held = length;
        break;
      }
    }
  }
  return held;
}

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (size_t i = 0; i < stops_.size(); ++i) {
    if (stops_[i].empty()) throw_usage("stop string {} is empty", i);
    if (valid_utf8_prefix(stops_[i]) != stops_[i].size()) throw_usage("stop string {} is not valid UTF-8", i);
  }
}

std::string StopStrings::push(std::string_view text) {
  if (matched_) return "";
  held_ += text;
  size_t best_begin = 0, best_end = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t begin = held_.find(stop);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stop.size();
    if (end < best_end || (end == best_end && begin < best_begin)) {
      best_begin = begin;
      best_end = end;
      matched_ = stop;
    }
  }
  if (matched_) {
    held_.resize(best_begin);
    return std::exchange(held_, "");
  }
  const size_t ready = held_.size() - held_back_bytes(held_, stops_);
  std::string out = held_.substr(0, ready);
  held_.erase(0, ready);
  return out;
}

std::string StopStrings::finish() { return std::exchange(held_, ""); }

}  // namespace dsv4
