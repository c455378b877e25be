// Implementation of text/bpe.h: a linked list of symbols and a heap of candidate pairs.
#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "base/check.h"

namespace dsv4 {
namespace {

uint64_t pair_key(TokenId left, TokenId right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= 0x9E3779B97F4A7C15ull;
  x ^= x >> 29;
  return x;
}

}  // namespace

Bpe::Bpe(const std::array<TokenId, 256>& byte_ids, const std::vector<BpeMerge>& merges) : byte_ids_(byte_ids) {
  DSV4_CHECK(merges.size() < (1u << 30), "{} merges", merges.size());
  slots_.resize(std::bit_ceil(merges.size() * 2 + 1));
  const size_t mask = slots_.size() - 1;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t pair = pair_key(merges[rank].left, merges[rank].right);
    size_t at = mix(pair) & mask;
    for (; slots_[at].pair != UINT64_MAX; at = (at + 1) & mask)
      DSV4_CHECK(slots_[at].pair != pair, "merge {} repeats a pair", rank);
    slots_[at] = {pair, static_cast<uint32_t>(rank), merges[rank].product};
  }
}

const Bpe::Slot& Bpe::find(TokenId left, TokenId right) const {
  const uint64_t pair = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  size_t at = mix(pair) & mask;
  while (slots_[at].pair != pair && slots_[at].pair != UINT64_MAX) at = (at + 1) & mask;
  return slots_[at];  // an empty slot has kNoRank
}

void Bpe::rank_pair(Scratch& scratch, int32_t index) const {
  Scratch::Symbol& symbol = scratch.symbols[index];
  symbol.rank = kNoRank;
  if (symbol.next < 0) return;
  const Slot& slot = find(symbol.id, scratch.symbols[symbol.next].id);
  if (slot.rank == kNoRank) return;
  symbol.rank = slot.rank;
  symbol.product = slot.product;
  scratch.heap.push_back(static_cast<uint64_t>(slot.rank) << 32 | static_cast<uint32_t>(index));
}

void Bpe::encode(std::string_view piece, Scratch& scratch, std::vector<TokenId>& out) const {
  DSV4_CHECK(piece.size() <= static_cast<size_t>(std::numeric_limits<int32_t>::max()), "piece of {} bytes",
             piece.size());
  const auto count = static_cast<int32_t>(piece.size());
  if (count == 0) return;
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  symbols.resize(piece.size());
  heap.clear();
  for (int32_t i = 0; i < count; ++i)
    symbols[i] = {byte_ids_[static_cast<uint8_t>(piece[i])], -1, kNoRank, i - 1, i + 1 < count ? i + 1 : -1};
  for (int32_t i = 0; i + 1 < count; ++i) rank_pair(scratch, i);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const auto rank = static_cast<uint32_t>(heap.back() >> 32);
    const auto index = static_cast<int32_t>(heap.back());
    heap.pop_back();
    Scratch::Symbol& left = symbols[index];
    if (left.rank != rank) continue;  // this pair was changed by a merge beside it; absorbed symbols have kNoRank

    Scratch::Symbol& right = symbols[left.next];
    left.id = left.product;
    left.next = right.next;
    right.rank = kNoRank;
    if (left.next >= 0) symbols[left.next].prev = index;
    for (const int32_t changed : {left.prev, index}) {
      if (changed < 0) continue;
      const size_t before = heap.size();
      rank_pair(scratch, changed);
      if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].next) out.push_back(symbols[i].id);
}

}  // namespace dsv4
