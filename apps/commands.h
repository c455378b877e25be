// The subcommands of dsv4, one cmd_<name>.cpp each. register_<name> adds its options; the work runs from the callback.
//
// Results go to stdout, progress and logs to stderr. Throw dsv4::Error to end with its exit code.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace dsv4::app {

struct GlobalOptions {
  bool quiet = false;
  std::string log_level = "warning";
  int exit_code = 0;  // set by a command that ran but found a problem (inspect on an unusable folder)
};

void register_inspect(CLI::App& app, GlobalOptions& options);
void register_synth(CLI::App& app, GlobalOptions& options);
void register_quantize(CLI::App& app, GlobalOptions& options);
void register_generate(CLI::App& app, GlobalOptions& options);
void register_chat(CLI::App& app, GlobalOptions& options);
void register_eval(CLI::App& app, GlobalOptions& options);
void register_bench(CLI::App& app, GlobalOptions& options);
void register_doctor(CLI::App& app, GlobalOptions& options);

}  // namespace dsv4::app
