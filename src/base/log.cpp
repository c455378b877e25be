// The installed log sink and its threshold.
#include "base/log.h"

#include <atomic>
#include <mutex>

namespace dsv4 {
namespace {
std::mutex sink_mutex;
LogSink installed_sink;
std::atomic<int> installed_threshold{static_cast<int>(LogLevel::kOff)};
}  // namespace

void set_log_sink(LogSink sink, LogLevel threshold) {
  std::lock_guard lock(sink_mutex);
  installed_sink = std::move(sink);
  installed_threshold = installed_sink ? static_cast<int>(threshold) : static_cast<int>(LogLevel::kOff);
}

bool log_enabled(LogLevel level) {
  return static_cast<int>(level) >= installed_threshold.load(std::memory_order_relaxed);
}

void log_message(LogLevel level, std::string_view message) {
  std::lock_guard lock(sink_mutex);
  if (installed_sink) installed_sink(level, message);
}

}  // namespace dsv4
