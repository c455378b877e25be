// Implementation of text/tokenizer_json.h.
#include "text/tokenizer_json.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "base/check.h"
#include "base/json.h"
#include "text/added_tokens.h"

namespace dsv4 {
namespace {

constexpr JsonLimits kLimits = {.max_bytes = 256ull << 20, .max_depth = 32};
constexpr size_t kMaxSplitPatterns = 16;
constexpr size_t kMaxTokenBytes = 64 << 10;
constexpr size_t kQuotedBytes = 80;

// A short printed form of a value for "found ..." in errors.
std::string quoted(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kQuotedBytes) text = text.substr(0, kQuotedBytes) + "...";
  return text;
}

// A JSON value that knows its key path, so that every complaint can name it.
class Node {
 public:
  Node(const Json& value, std::string path, const std::string& source)
      : value_(value), path_(std::move(path)), source_(source) {}

  const Json& value() const { return value_; }
  const std::string& path() const { return path_; }
  size_t size() const { return value_.size(); }
  bool is_null() const { return value_.is_null(); }

  [[noreturn]] void fail(std::string_view expected) const {
    throw_bad_input("{}: {}: expected {}, found {}", source_, path_, expected, quoted(value_));
  }
  const Node& require_object() const {
    if (!value_.is_object()) fail("an object");
    return *this;
  }
  const Node& require_array() const {
    if (!value_.is_array()) fail("an array");
    return *this;
  }
  Node at(const char* key) const {
    require_object();
    const auto found = value_.find(key);
    if (found == value_.end()) throw_bad_input("{}: {}: missing", source_, join(key));
    return {*found, join(key), source_};
  }
  // A missing key reads as null.
  Node get(const char* key) const {
    static const Json kNull;
    require_object();
    const auto found = value_.find(key);
    return {found == value_.end() ? kNull : *found, join(key), source_};
  }
  Node at(size_t i) const { return {value_[i], fmt::format("{}[{}]", path_, i), source_}; }

  const std::string& string() const {
    if (!value_.is_string()) fail("a string");
    return value_.get_ref<const std::string&>();
  }
  bool boolean() const {
    if (!value_.is_boolean()) fail("true or false");
    return value_.get<bool>();
  }
  TokenId token_id() const {
    const bool ok = value_.is_number_integer() && (value_.is_number_unsigned() || value_.get<int64_t>() >= 0) &&
                    value_.get<uint64_t>() < static_cast<uint64_t>(kMaxVocabSize);
    if (!ok) fail(fmt::format("a token id from 0 to {}", kMaxVocabSize - 1));
    return static_cast<TokenId>(value_.get<uint64_t>());
  }

  void require_string(std::string_view expected) const {
    if (!value_.is_string() || value_.get_ref<const std::string&>() != expected) fail(fmt::format("\"{}\"", expected));
  }
  // For switches whose other setting is not implemented; absent means the default, which is off.
  void require_false_or_absent() const {
    if (!is_null() && !(value_.is_boolean() && !value_.get<bool>())) fail("false (nothing else is supported)");
  }
  void require_false() const {
    if (!(value_.is_boolean() && !value_.get<bool>())) fail("false (nothing else is supported)");
  }
  void require_null() const {
    if (!is_null()) fail("null (nothing else is supported)");
  }
  void require_null_or_empty() const {
    if (!is_null() && !(value_.is_string() && value_.get_ref<const std::string&>().empty()))
      fail("null (nothing else is supported)");
  }

 private:
  std::string join(const char* key) const { return path_.empty() ? key : fmt::format("{}.{}", path_, key); }

  const Json& value_;
  std::string path_;
  const std::string& source_;
};

class TokenizerJsonReader {
 public:
  TokenizerJsonReader(const Json& root, const std::string& source) : root_(root, "", source), source_(source) {}

  // post_processor, truncation and padding are not read: they describe what Hugging Face's library adds around a text;
  // here the caller adds BOS.
  TokenizerJson run() {
    if (!root_.value().is_object())
      throw_bad_input("{}: expected a JSON object, found {}", source_, quoted(root_.value()));
    root_.at("version").require_string("1.0");
    check_normalizer();
    read_pre_tokenizer();
    root_.at("decoder").at("type").require_string("ByteLevel");
    read_model();
    read_added_tokens();
    return std::move(out_);
  }

 private:
  void check_normalizer() {
    const Node normalizer = root_.get("normalizer");
    if (normalizer.is_null()) return;
    normalizer.require_object();
    const bool empty_sequence =
        normalizer.get("type").value() == "Sequence" && normalizer.get("normalizers").value() == Json::array();
    if (!empty_sequence) normalizer.fail("null or an empty Sequence (normalisers are not supported)");
  }

  void read_pre_tokenizer() {
    const Node pre_tokenizer = root_.at("pre_tokenizer");
    pre_tokenizer.require_object();
    if (pre_tokenizer.at("type").string() == "ByteLevel") return check_byte_level(pre_tokenizer);
    pre_tokenizer.at("type").require_string("Sequence");
    const Node steps = pre_tokenizer.at("pretokenizers");
    steps.require_array();
    if (steps.size() == 0 || steps.size() > kMaxSplitPatterns + 1)
      throw_bad_input("{}: {}: expected 1 to {} entries, found {}", source_, steps.path(), kMaxSplitPatterns + 1,
                      steps.size());
    for (size_t i = 0; i + 1 < steps.size(); ++i) {
      const Node step = steps.at(i);
      step.at("type").require_string("Split");
      step.at("behavior").require_string("Isolated");
      step.get("invert").require_false_or_absent();
      const Node pattern = step.at("pattern");
      if (!pattern.value().is_object() || pattern.size() != 1 || !pattern.value().contains("Regex"))
        pattern.fail("{\"Regex\": ...}");
      out_.split_patterns.push_back(pattern.at("Regex").string());
    }
    check_byte_level(steps.at(steps.size() - 1));
  }

  void check_byte_level(const Node& step) {
    step.at("type").require_string("ByteLevel");
    step.at("add_prefix_space").require_false();  // both default to true in the library: they must be there
    step.at("use_regex").require_false();
  }

  void read_model() {
    const Node model = root_.at("model");
    model.at("type").require_string("BPE");
    model.get("dropout").require_null();
    model.get("unk_token").require_null();
    model.get("continuing_subword_prefix").require_null_or_empty();
    model.get("end_of_word_suffix").require_null_or_empty();
    for (const char* flag : {"byte_fallback", "ignore_merges"}) model.get(flag).require_false_or_absent();
    read_vocab(model.at("vocab"));
    read_merges(model.at("merges"));
  }

  void read_vocab(const Node& vocab) {
    vocab.require_object();
    if (vocab.size() == 0 || vocab.size() > static_cast<size_t>(kMaxVocabSize))
      throw_bad_input("{}: {}: expected 1 to {} tokens, found {}", source_, vocab.path(), kMaxVocabSize, vocab.size());
    out_.vocab.reserve(vocab.size());
    id_of_.reserve(vocab.size());
    for (const auto& [content, value] : vocab.value().items()) {
      if (content.empty() || content.size() > kMaxTokenBytes)
        throw_bad_input("{}: {}: expected tokens of 1 to {} bytes, found one of {}", source_, vocab.path(),
                        kMaxTokenBytes, content.size());
      const TokenId id = Node(value, fmt::format("{}[\"{}\"]", vocab.path(), content), source_).token_id();
      claim_id(id, content);
      id_of_.emplace(content, id);
      out_.vocab.emplace_back(content, id);
    }
  }

  void claim_id(TokenId id, const std::string& content) {
    const auto [holder, is_new] = content_of_.emplace(id, content);
    if (!is_new)
      throw_bad_input("{}: token id {} is given to both \"{}\" and \"{}\"", source_, id, holder->second, content);
  }

  void read_merges(const Node& merges) {
    merges.require_array();
    out_.merges.reserve(merges.size());
    std::unordered_set<uint64_t> seen;
    seen.reserve(merges.size());
    for (size_t i = 0; i < merges.size(); ++i) {
      const auto [left, right] = merge_parts(merges.at(i));
      BpeMerge merge{};
      for (const auto& [part, id] :
           {std::pair{left, &merge.left}, {right, &merge.right}, {left + right, &merge.product}}) {
        const auto found = id_of_.find(part);
        if (found == id_of_.end())
          throw_bad_input("{}: {}[{}]: \"{}\" + \"{}\" needs the token \"{}\", which model.vocab lacks", source_,
                          merges.path(), i, left, right, part);
        *id = found->second;
      }
      if (!seen.insert(static_cast<uint64_t>(merge.left) << 32 | static_cast<uint64_t>(merge.right)).second)
        throw_bad_input("{}: {}[{}]: the pair \"{}\" + \"{}\" was merged before", source_, merges.path(), i, left,
                        right);
      out_.merges.push_back(merge);
    }
  }

  static std::pair<std::string, std::string> merge_parts(const Node& merge) {
    if (merge.value().is_array() && merge.size() == 2) return {merge.at(size_t{0}).string(), merge.at(1).string()};
    if (merge.value().is_string()) {
      const std::string& text = merge.string();
      const size_t space = text.find(' ');
      if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos)
        return {text.substr(0, space), text.substr(space + 1)};
    }
    merge.fail("\"left right\" or [\"left\", \"right\"]");
  }

  void read_added_tokens() {
    const Node tokens = root_.get("added_tokens");
    if (tokens.is_null()) return;
    tokens.require_array();
    std::unordered_set<std::string> seen;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const Node token = tokens.at(i);
      AddedToken added{token.at("id").token_id(), token.at("content").string(), token.at("special").boolean(),
                       token.at("normalized").boolean()};
      if (added.content.empty() || added.content.size() > AddedTokenTrie::kMaxContentBytes)
        token.at("content").fail(fmt::format("1 to {} bytes", AddedTokenTrie::kMaxContentBytes));
      if (!seen.insert(added.content).second) token.at("content").fail("a content that no earlier added token has");
      for (const char* flag : {"single_word", "lstrip", "rstrip"}) token.get(flag).require_false_or_absent();
      const auto in_vocab = id_of_.find(added.content);
      if (in_vocab == id_of_.end()) {
        claim_id(added.id, added.content);
      } else if (in_vocab->second != added.id) {
        token.at("id").fail(fmt::format("{}, the id of \"{}\" in model.vocab", in_vocab->second, added.content));
      }
      out_.added_tokens.push_back(std::move(added));
    }
  }

  Node root_;
  const std::string& source_;
  TokenizerJson out_;
  std::unordered_map<std::string, TokenId> id_of_;       // model.vocab
  std::unordered_map<TokenId, std::string> content_of_;  // every id used so far
};

}  // namespace

TokenizerJson parse_tokenizer_json(std::string_view text, const std::string& source) {
  const Json root = parse_json(text, source, kLimits);
  return TokenizerJsonReader(root, source).run();
}

}  // namespace dsv4
