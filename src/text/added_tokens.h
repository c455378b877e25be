// Finds added tokens in raw text: the longest one at the leftmost position.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>

#include "text/token_id.h"

namespace dsv4 {

class AddedTokenTrie {
 public:
  // Bounds the work per position of find().
  static constexpr size_t kMaxContentBytes = 256;

  // content: 1..kMaxContentBytes bytes, not added before.
  void add(std::string_view content, TokenId id);
  bool empty() const { return num_nodes_ == 1; }

  struct Match {
    size_t begin;
    size_t end;
    TokenId id;
  };
  // First match that begins at or after from; false if there is none.
  bool find(std::string_view text, size_t from, Match& match) const;

 private:
  static uint64_t edge(uint32_t node, char byte) {
    return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
  }

  uint32_t num_nodes_ = 1;
  std::unordered_map<uint64_t, uint32_t> children_;  // (node, byte) -> node
  std::unordered_map<uint32_t, TokenId> ids_;        // nodes where a token ends
  std::array<bool, 256> starts_{};                   // first bytes of all tokens
};

}  // namespace dsv4
