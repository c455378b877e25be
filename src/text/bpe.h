// Byte-pair merging of one piece: the adjacent pair of lowest rank first, the leftmost of equal ones.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "text/token_id.h"

namespace dsv4 {

struct BpeMerge {  // rank = position in the list
  TokenId left;
  TokenId right;
  TokenId product;
};

class Bpe {
 public:
  // Memory that encode() reuses from piece to piece; one per thread.
  struct Scratch {
    struct Symbol {
      TokenId id;
      TokenId product;  // of the pair (this, next)
      uint32_t rank;    // of that pair; kNoRank if it does not merge
      int32_t prev;     // -1 at the start
      int32_t next;     // -1 at the end
    };
    std::vector<Symbol> symbols;
    std::vector<uint64_t> heap;  // rank << 32 | index of the left symbol
  };

  Bpe() = default;
  // byte_ids: the token of each byte. Pairs of merges must be distinct.
  Bpe(const std::array<TokenId, 256>& byte_ids, const std::vector<BpeMerge>& merges);

  // Appends the tokens of piece (at most 2^31 - 1 bytes) to out. O(n log n) for any piece.
  void encode(std::string_view piece, Scratch& scratch, std::vector<TokenId>& out) const;

 private:
  static constexpr uint32_t kNoRank = UINT32_MAX;
  struct Slot {
    uint64_t pair = UINT64_MAX;  // left << 32 | right; UINT64_MAX = empty
    uint32_t rank = kNoRank;
    TokenId product = -1;
  };
  const Slot& find(TokenId left, TokenId right) const;
  void rank_pair(Scratch& scratch, int32_t index) const;

  std::array<TokenId, 256> byte_ids_{};
  std::vector<Slot> slots_;  // open addressing, power of two, at most half full
};

}  // namespace dsv4
