// A list of problems found in one folder: all are counted, the first ones are kept.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace dsv4 {

class ProblemList {
 public:
  static constexpr size_t kMaxListed = 50;

  void add(std::string text) {
    ++count_;
    if (listed_.size() < kMaxListed) listed_.push_back(std::move(text));
  }
  bool empty() const { return count_ == 0; }
  int64_t count() const { return count_; }
  const std::vector<std::string>& listed() const { return listed_; }

  // "3 problems:\n  first\n  second\n  third"; says how many more there are than it lists.
  std::string text() const {
    std::string all = std::to_string(count_) + (count_ == 1 ? " problem:" : " problems:");
    for (const std::string& line : listed_) all += "\n  " + line;
    if (count_ > static_cast<int64_t>(listed_.size()))
      all += "\n  and " + std::to_string(count_ - static_cast<int64_t>(listed_.size())) + " more";
    return all;
  }

 private:
  int64_t count_ = 0;
  std::vector<std::string> listed_;
};

}  // namespace dsv4
