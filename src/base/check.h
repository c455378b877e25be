// Errors: one exception type that carries what happened and the process exit code it maps to.
//
// Everything below apps/ throws dsv4::Error and never prints or exits. Messages are lower case, without a
// full stop, and carry the numbers: what was expected, what was found, and where (file, tensor, key).
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace dsv4 {

// The values are the documented process exit codes.
enum class ErrorKind : int {
  kBadInput = 1,         // a file or request is malformed or inconsistent
  kUsage = 2,            // wrong command line
  kResourceMissing = 3,  // memory, disk space, device, permission
  kInternal = 4,         // a broken invariant: our bug
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }
  int exit_code() const { return static_cast<int>(kind_); }

 private:
  ErrorKind kind_;
};

template <class... T>
[[noreturn]] void throw_bad_input(fmt::format_string<T...> format, T&&... args) {
  throw Error(ErrorKind::kBadInput, fmt::format(format, std::forward<T>(args)...));
}
template <class... T>
[[noreturn]] void throw_usage(fmt::format_string<T...> format, T&&... args) {
  throw Error(ErrorKind::kUsage, fmt::format(format, std::forward<T>(args)...));
}
template <class... T>
[[noreturn]] void throw_resource(fmt::format_string<T...> format, T&&... args) {
  throw Error(ErrorKind::kResourceMissing, fmt::format(format, std::forward<T>(args)...));
}

// A broken precondition or invariant: always on, in release builds too.
#define DSV4_CHECK(condition, ...)                                                                                     \
  do {                                                                                                                 \
    if (!(condition)) [[unlikely]]                                                                                     \
      throw ::dsv4::Error(::dsv4::ErrorKind::kInternal,                                                                \
                          ::fmt::format("{}:{}: {}: {}", __FILE__, __LINE__, #condition, ::fmt::format(__VA_ARGS__))); \
  } while (false)

}  // namespace dsv4
