// dsv4: the command line. Parses, runs one subcommand, turns errors into messages and exit codes.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <new>

#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "commands.h"

namespace {

constexpr const char* kExitCodes =
    "exit codes: 0 done, 1 bad input, 2 wrong usage, 3 resource missing (memory, disk, permission, device), 4 internal "
    "error, "
    "130 interrupted";

void install_stderr_log(const dsv4::app::GlobalOptions& options) {
  using dsv4::LogLevel;
  LogLevel level = LogLevel::kWarning;
  if (options.log_level == "debug") level = LogLevel::kDebug;
  if (options.log_level == "info") level = LogLevel::kInfo;
  if (options.log_level == "error" || options.quiet) level = LogLevel::kError;
  dsv4::set_log_sink(
      [](LogLevel message_level, std::string_view message) {
        constexpr const char* kNames[] = {"debug", "info", "warning", "error"};
        std::fprintf(stderr, "dsv4: %s: %.*s\n", kNames[static_cast<int>(message_level)],
                     static_cast<int>(message.size()), message.data());
      },
      level);
}

// Weights are read through a memory map: if the file shrinks meanwhile, or its disk fails, the read raises SIGBUS.
void on_bus_error(int) {
  constexpr char kMessage[] = "dsv4: error: a mapped file became shorter or unreadable while it was in use\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kMessage, sizeof(kMessage) - 1);
  ::_exit(1);
}

void install_bus_error_handler() {
  struct sigaction action {};
  action.sa_handler = on_bus_error;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  install_bus_error_handler();
  CLI::App app{"DeepSeek-V4 with NVFP4 experts: from checkpoint to text", "dsv4"};
  dsv4::app::GlobalOptions options;
  app.footer(kExitCodes);
  app.set_version_flag("--version", std::string("dsv4 ") + DSV4_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  app.add_flag("-q,--quiet", options.quiet, "no progress, no statistics");
  app.add_option("--log-level", options.log_level, "debug, info, warning or error")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->capture_default_str();
  app.parse_complete_callback([&options] { install_stderr_log(options); });

  dsv4::app::register_inspect(app, options);
  dsv4::app::register_quantize(app, options);
  dsv4::app::register_generate(app, options);
  dsv4::app::register_chat(app, options);
  dsv4::app::register_eval(app, options);
  dsv4::app::register_bench(app, options);
  dsv4::app::register_doctor(app, options);
  dsv4::app::register_synth(app, options);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : 2;
  } catch (const dsv4::Error& error) {
    std::fprintf(stderr, "dsv4: error: %s\n", error.what());
    return error.exit_code();
  } catch (const std::filesystem::filesystem_error& error) {
    std::fprintf(stderr, "dsv4: error: %s\n", error.what());
    return static_cast<int>(dsv4::filesystem_error_kind(error.code()));
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "dsv4: error: out of memory\n");
    return 3;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dsv4: internal error: %s\n", error.what());
    return 4;
  }
  return options.exit_code;
}
