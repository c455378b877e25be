// A SAX filter in front of nlohmann's DOM builder: depth and duplicate keys are refused as they appear.
#include "base/json.h"

#include <unordered_set>
#include <vector>

#include "base/check.h"
#include "base/file.h"

namespace dsv4 {
namespace {

// As JSON text, control characters escaped, long keys cut.
std::string shown_key(const std::string& key) {
  const std::string text = Json(key.substr(0, 200)).dump(-1, ' ', true, Json::error_handler_t::replace);
  return key.size() > 200 ? text + "..." : text;
}

class LimitedDom : public nlohmann::json_sax<Json> {
 public:
  LimitedDom(Json& root, const std::string& source, int max_depth)
      : dom_(root, true), source_(source), max_depth_(max_depth) {}

  bool null() override { return dom_.null(); }
  bool boolean(bool value) override { return dom_.boolean(value); }
  bool number_integer(number_integer_t value) override { return dom_.number_integer(value); }
  bool number_unsigned(number_unsigned_t value) override { return dom_.number_unsigned(value); }
  bool number_float(number_float_t value, const string_t& text) override { return dom_.number_float(value, text); }
  bool string(string_t& value) override { return dom_.string(value); }
  bool binary(binary_t& value) override { return dom_.binary(value); }
  bool start_object(std::size_t size) override {
    enter();
    keys_.emplace_back();
    return dom_.start_object(size);
  }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) throw_bad_input("{}: duplicate key {}", source_, shown_key(name));
    return dom_.key(name);
  }
  bool end_object() override {
    --depth_;
    keys_.pop_back();
    return dom_.end_object();
  }
  bool start_array(std::size_t size) override {
    enter();
    return dom_.start_array(size);
  }
  bool end_array() override {
    --depth_;
    return dom_.end_array();
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    throw_bad_input("{}: invalid JSON at byte {}: {}", source_, position, error.what());
  }

 private:
  void enter() {
    if (++depth_ > max_depth_) throw_bad_input("{}: JSON nested deeper than {} levels", source_, max_depth_);
  }

  nlohmann::detail::json_sax_dom_parser<Json> dom_;
  const std::string& source_;
  int max_depth_;
  int depth_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& source, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes)
    throw_bad_input("{}: JSON text of {} bytes, at most {} are accepted", source, text.size(), limits.max_bytes);
  Json root;
  LimitedDom filter(root, source, limits.max_depth);
  Json::sax_parse(text.begin(), text.end(), &filter);
  return root;
}

Json read_json_file(const std::string& path, const JsonLimits& limits) {
  return parse_json(read_text_file(path, limits.max_bytes), path, limits);
}

}  // namespace dsv4
