// Implementation of text/tokenizer.h: added tokens, then split patterns, then byte-pair merging.
#include "text/tokenizer.h"

#include <algorithm>
#include <unordered_map>

#include "base/check.h"
#include "base/file.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/byte_alphabet.h"
#include "text/split_pattern.h"
#include "text/tokenizer_json.h"
#include "text/utf8.h"

namespace dsv4 {
namespace {

constexpr uint64_t kMaxFileBytes = 256ull << 20;

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

}  // namespace

struct Tokenizer::Impl {
  struct Token {
    std::string bytes;
    bool exists = false;
    bool special = false;
  };

  std::vector<Token> tokens;  // [vocab_size]; holes do not exist
  std::unordered_map<std::string, TokenId, StringHash, std::equal_to<>> ids;
  AddedTokenTrie added_first;  // not normalized: DeepSeek's special tokens
  AddedTokenTrie added_second;
  std::vector<SplitPattern> patterns;
  Bpe bpe;

  // The working memory of one encode() call, so that a tokenizer can be shared by threads.
  struct Encoder {
    const Impl& tokenizer;
    std::vector<SplitPattern::Matcher> matchers;
    Bpe::Scratch scratch;
    std::vector<TokenId> out;

    explicit Encoder(const Impl& impl) : tokenizer(impl) {
      for (const SplitPattern& pattern : impl.patterns) matchers.emplace_back(pattern);
    }

    // passes: the tries still to be applied to text.
    void added_tokens(std::string_view text, std::span<const AddedTokenTrie* const> passes) {
      if (passes.empty()) return ordinary(text);
      size_t at = 0;
      AddedTokenTrie::Match match{};
      while (!passes[0]->empty() && passes[0]->find(text, at, match)) {
        added_tokens(text.substr(at, match.begin - at), passes.subspan(1));
        out.push_back(match.id);
        at = match.end;
      }
      added_tokens(text.substr(at), passes.subspan(1));
    }

    // Runs of invalid bytes are pieces of their own: the patterns speak of characters only.
    void ordinary(std::string_view text) {
      while (!text.empty()) {
        const size_t valid = valid_utf8_prefix(text);
        split(text.substr(0, valid), 0);
        size_t end = valid;
        while (end < text.size()) {
          const Utf8Unit unit = read_utf8(text.substr(end));
          if (unit.kind == Utf8Kind::kValid) break;
          end += static_cast<size_t>(unit.length);
        }
        tokenizer.bpe.encode(text.substr(valid, end - valid), scratch, out);
        text.remove_prefix(end);
      }
    }

    // Pattern number step cuts piece into its matches and what lies between them; each goes on to the next pattern.
    void split(std::string_view piece, size_t step) {
      if (piece.empty()) return;
      if (step == matchers.size()) return tokenizer.bpe.encode(piece, scratch, out);
      size_t at = 0;
      TextRange match{};
      while (at < piece.size() && matchers[step].find(piece, at, match)) {
        split(piece.substr(at, match.begin - at), step + 1);
        split(piece.substr(match.begin, match.end - match.begin), step + 1);
        at = match.end;
      }
      split(piece.substr(at), step + 1);
    }
  };

  const Token& token(TokenId id) const {
    if (id < 0 || static_cast<size_t>(id) >= tokens.size() || !tokens[id].exists)
      throw_bad_input("token id {} is not in the vocabulary of {} ids", id, tokens.size());
    return tokens[id];
  }

  void add_token(TokenId id, const std::string& content, std::string bytes, bool special) {
    if (static_cast<size_t>(id) >= tokens.size()) tokens.resize(static_cast<size_t>(id) + 1);
    tokens[id] = {std::move(bytes), true, special};
    ids.insert_or_assign(content, id);
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::string& tokenizer_json_path) {
  return parse(read_text_file(tokenizer_json_path, kMaxFileBytes), tokenizer_json_path);
}

Tokenizer Tokenizer::parse(std::string_view json_text, const std::string& source) {
  const TokenizerJson json = parse_tokenizer_json(json_text, source);
  auto impl = std::make_unique<Impl>();
  const ByteAlphabet alphabet;
  for (const auto& [content, id] : json.vocab) {
    // A token with characters outside the alphabet cannot come from merges; as in Hugging Face's decoder it stands for
    // its own text.
    impl->add_token(id, content, alphabet.bytes_of(content).value_or(content), false);
  }
  std::array<TokenId, 256> byte_ids{};
  for (int byte = 0; byte < 256; ++byte) {
    const std::string& character = alphabet.character(static_cast<uint8_t>(byte));
    const auto found = impl->ids.find(character);
    if (found == impl->ids.end())
      throw_bad_input("{}: model.vocab: the token \"{}\" of byte {:#04x} is missing", source, character, byte);
    byte_ids[byte] = found->second;
  }
  impl->bpe = Bpe(byte_ids, json.merges);
  for (const AddedToken& token : json.added_tokens) {
    const std::string as_bytes = alphabet.bytes_of(token.content).value_or(token.content);
    if (as_bytes != token.content && impl->ids.contains(token.content))
      throw_bad_input("{}: added token {} \"{}\" is also the byte-level form of other bytes in model.vocab", source,
                      token.id, token.content);
    impl->add_token(token.id, token.content, token.content, token.special);
    (token.normalized ? impl->added_second : impl->added_first).add(token.content, token.id);
  }
  for (size_t i = 0; i < json.split_patterns.size(); ++i)
    impl->patterns.emplace_back(json.split_patterns[i],
                                fmt::format("{}: pre_tokenizer.pretokenizers[{}].pattern.Regex", source, i));
  return Tokenizer(std::move(impl));
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(impl_->tokens.size()); }

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool parse_special) const {
  Impl::Encoder encoder(*impl_);
  const std::array<const AddedTokenTrie*, 2> passes = {&impl_->added_first, &impl_->added_second};
  encoder.added_tokens(text, parse_special ? std::span(passes) : std::span(passes).first(0));
  return std::move(encoder.out);
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  std::string text;
  for (const TokenId id : ids) {
    const Impl::Token& token = impl_->token(id);
    if (!(skip_special && token.special)) text += token.bytes;
  }
  return text;
}

std::string_view Tokenizer::token_bytes(TokenId id) const { return impl_->token(id).bytes; }

bool Tokenizer::is_special(TokenId id) const { return impl_->token(id).special; }

std::optional<TokenId> Tokenizer::token_id(std::string_view content) const {
  const auto found = impl_->ids.find(content);
  if (found == impl_->ids.end()) return std::nullopt;
  return found->second;
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  size_t at = 0;
  while (at < pending_.size()) {
    const std::string_view rest = std::string_view(pending_).substr(at);
    const Utf8Unit unit = read_utf8(rest);
    if (unit.kind == Utf8Kind::kIncomplete) break;
    out += unit.kind == Utf8Kind::kValid ? rest.substr(0, static_cast<size_t>(unit.length)) : kReplacementCharacter;
    at += static_cast<size_t>(unit.length);
  }
  pending_.erase(0, at);
  return out;
}

std::string Utf8Stream::finish() {
  const bool unfinished = !pending_.empty();
  pending_.clear();
  return unfinished ? std::string(kReplacementCharacter) : std::string();
}

}  // namespace dsv4
