// Logging to a sink that the application installs; libraries never print by themselves.
#pragma once

#include <fmt/format.h>

#include <functional>
#include <string_view>
#include <utility>

namespace dsv4 {

enum class LogLevel : int { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3, kOff = 4 };

using LogSink = std::function<void(LogLevel, std::string_view)>;

// Process-wide on purpose: one process has one stderr. Default: no sink, nothing is written.
void set_log_sink(LogSink sink, LogLevel threshold);
bool log_enabled(LogLevel level);
void log_message(LogLevel level, std::string_view message);

template <class... T>
void log(LogLevel level, fmt::format_string<T...> format, T&&... args) {
  if (log_enabled(level)) log_message(level, fmt::format(format, std::forward<T>(args)...));
}

}  // namespace dsv4
