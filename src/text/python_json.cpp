// Implementation of text/python_json.h.
#include "text/python_json.h"

#include <array>
#include <charconv>
#include <cmath>

#include "base/check.h"
#include "base/json.h"

namespace dsv4 {
namespace {

// repr(float): the shortest digits that read back the same, in scientific form outside 1e-4 <= |x| < 1e16.
std::string python_float(double value) {
  DSV4_CHECK(std::isfinite(value), "JSON has no {}", value);
  std::array<char, 64> buffer{};
  const double magnitude = std::fabs(value);
  const bool scientific = magnitude != 0 && (magnitude < 1e-4 || magnitude >= 1e16);
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                 scientific ? std::chars_format::scientific : std::chars_format::fixed);
  std::string text(buffer.data(), end.ptr);
  if (!scientific && text.find('.') == std::string::npos) text += ".0";
  return text;
}

void dump(const OrderedJson& value, std::string& out) {
  switch (value.type()) {
    case OrderedJson::value_t::object: {
      out += '{';
      bool first = true;
      for (const auto& [key, member] : value.items()) {
        if (!first) out += ", ";
        first = false;
        out += python_json_string(key) + ": ";
        dump(member, out);
      }
      out += '}';
      return;
    }
    case OrderedJson::value_t::array: {
      out += '[';
      bool first = true;
      for (const OrderedJson& member : value) {
        if (!first) out += ", ";
        first = false;
        dump(member, out);
      }
      out += ']';
      return;
    }
    case OrderedJson::value_t::string:
      out += python_json_string(value.get_ref<const std::string&>());
      return;
    case OrderedJson::value_t::number_float:
      out += python_float(value.get<double>());
      return;
    default:
      out += value.dump();
      return;
  }
}

}  // namespace

OrderedJson parse_ordered_json(std::string_view text, const std::string& source) {
  parse_json(text, source);
  return OrderedJson::parse(text);
}

std::string python_json(const OrderedJson& value) {
  std::string out;
  dump(value, out);
  return out;
}

std::string python_json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
        } else {
          out += c;
        }
    }
  }
  out += '"';
  return out;
}

}  // namespace dsv4
