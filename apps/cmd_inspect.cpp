// dsv4 inspect: what a checkpoint folder holds and what it would take to run it.
#include <fmt/format.h>

#include <memory>

#include "checkpoint/inspect.h"
#include "commands.h"

namespace dsv4::app {
namespace {

struct InspectArguments {
  std::string folder;
  bool json = false;
};

void run_inspect(const InspectArguments& arguments, GlobalOptions& global) {
  const InspectReport report = inspect_checkpoint(arguments.folder);
  // Names in a broken file need not be UTF-8 once cut; the output always is.
  fmt::print("{}", arguments.json ? inspect_json(report).dump(2, ' ', false, Json::error_handler_t::replace) + "\n"
                                  : inspect_text(report));
  if (!report.usable) global.exit_code = 1;
}

}  // namespace

void register_inspect(CLI::App& app, GlobalOptions& global) {
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* command = app.add_subcommand("inspect", "formats, layers, sizes, memory per token, every problem of a checkpoint");
  command->add_option("DIR", arguments->folder, "checkpoint folder")->required();
  command->add_flag("--json", arguments->json, "one JSON object");
  command->callback([arguments, &global] { run_inspect(*arguments, global); });
}

}  // namespace dsv4::app
