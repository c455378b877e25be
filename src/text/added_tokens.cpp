// Implementation of text/added_tokens.h.
#include "text/added_tokens.h"

#include "base/check.h"

namespace dsv4 {

void AddedTokenTrie::add(std::string_view content, TokenId id) {
  DSV4_CHECK(!content.empty() && content.size() <= kMaxContentBytes, "added token of {} bytes", content.size());
  uint32_t node = 0;
  for (const char byte : content) {
    const auto [child, is_new] = children_.try_emplace(edge(node, byte), num_nodes_);
    if (is_new) ++num_nodes_;
    node = child->second;
  }
  DSV4_CHECK(ids_.emplace(node, id).second, "added token {} repeats an earlier one", id);
  starts_[static_cast<uint8_t>(content.front())] = true;
}

bool AddedTokenTrie::find(std::string_view text, size_t from, Match& match) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<uint8_t>(text[begin])]) continue;
    bool found = false;
    uint32_t node = 0;
    for (size_t at = begin; at < text.size(); ++at) {
      const auto child = children_.find(edge(node, text[at]));
      if (child == children_.end()) break;
      node = child->second;
      const auto id = ids_.find(node);
      if (id == ids_.end()) continue;
      match = {begin, at + 1, id->second};
      found = true;
    }
    if (found) return true;
  }
  return false;
}

}  // namespace dsv4
