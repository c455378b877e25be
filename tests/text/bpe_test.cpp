// Byte-pair merging against the definition, and its growth on long pieces.
#include "text/bpe.h"

#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <random>
#include <set>

namespace dsv4 {
namespace {

std::array<TokenId, 256> identity_bytes() {
  std::array<TokenId, 256> ids{};
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

// The definition: again and again merge the leftmost pair of lowest rank.
std::vector<TokenId> merge_by_definition(std::vector<TokenId> ids, const std::vector<BpeMerge>& merges) {
  while (true) {
    size_t best_rank = merges.size(), best_at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i)
      for (size_t rank = 0; rank < best_rank; ++rank)
        if (merges[rank].left == ids[i] && merges[rank].right == ids[i + 1]) {
          best_rank = rank;
          best_at = i;
        }
    if (best_rank == merges.size()) return ids;
    ids[best_at] = merges[best_rank].product;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best_at) + 1);
  }
}

std::vector<TokenId> encode(const Bpe& bpe, std::string_view piece) {
  Bpe::Scratch scratch;
  std::vector<TokenId> out;
  bpe.encode(piece, scratch, out);
  return out;
}

TEST(Bpe, RandomMergeListsOnRandomPiecesMatchTheDefinition) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<BpeMerge> merges;
    std::set<std::pair<TokenId, TokenId>> seen;
    std::vector<TokenId> known = {'a', 'b', 'c'};
    for (TokenId product = 256; product < 256 + 25; ++product) {
      const TokenId left = known[random() % known.size()], right = known[random() % known.size()];
      if (!seen.insert({left, right}).second) continue;
      // One product in four is shared by two pairs, as different splits of one token are.
      const TokenId made = random() % 4 == 0 ? known[random() % known.size()] : product;
      merges.push_back({left, right, made});
      known.push_back(product);
    }
    const Bpe bpe(identity_bytes(), merges);
    for (int piece_idx = 0; piece_idx < 20; ++piece_idx) {
      std::string piece(random() % 60, 'a');
      for (char& c : piece) c = static_cast<char>('a' + random() % 3);
      EXPECT_EQ(encode(bpe, piece), merge_by_definition({piece.begin(), piece.end()}, merges));
    }
  }
}

TEST(Bpe, EqualRanksMergeFromTheLeft) {
  const Bpe bpe(identity_bytes(), {{'a', 'a', 256}});
  EXPECT_EQ(encode(bpe, "aaaaa"), (std::vector<TokenId>{256, 256, 'a'}));
}

TEST(Bpe, NoMergesAndEmptyPiecesWork) {
  const Bpe bpe(identity_bytes(), {});
  EXPECT_EQ(encode(bpe, "ab"), (std::vector<TokenId>{'a', 'b'}));
  EXPECT_TRUE(encode(bpe, "").empty());
}

TEST(Bpe, APieceOfFourMegabytesIsNotQuadratic) {
  std::vector<BpeMerge> merges = {{'a', 'a', 256}};
  for (TokenId id = 256; id < 270; ++id) merges.push_back({id, id, id + 1});
  const Bpe bpe(identity_bytes(), merges);
  const auto start = std::chrono::steady_clock::now();
  const auto ids = encode(bpe, std::string(4 << 20, 'a'));
  // Quadratic would be 10^13 steps; the limit is generous for sanitizers and a busy machine.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  EXPECT_EQ(ids, std::vector<TokenId>(128, 270));
}

}  // namespace
}  // namespace dsv4
