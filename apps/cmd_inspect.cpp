// dsv4 inspect: what a checkpoint folder holds and what it would take to run it.
#include <fmt/format.h>

#include <filesystem>
#include <memory>

#include "base/check.h"
#include "checkpoint/inspect.h"
#include "commands.h"
#include "text/tokenizer.h"

namespace dsv4::app {
namespace {

struct InspectArguments {
  std::string folder;
  bool json = false;
};

// The engine refuses a folder without a tokenizer, or with one whose ids pass vocab_size.
void inspect_tokenizer(InspectReport& report) {
  const std::string path = report.folder + "/tokenizer.json";
  try {
    const int64_t size = Tokenizer::load(path).vocab_size();
    report.tokenizer = fmt::format("{} ids", size);
    if (report.has_config && size > report.config.vocab_size)
      report.problems.add(fmt::format("{}: vocabulary of {} ids, config.json says vocab_size {}", path, size,
                                      report.config.vocab_size));
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kBadInput) throw;
    report.problems.add(error.what());
  }
  report.usable = report.problems.empty();
}

void run_inspect(const InspectArguments& arguments, GlobalOptions& global) {
  InspectReport report = inspect_checkpoint(arguments.folder);
  std::error_code error;  // is in the report already
  if (std::filesystem::is_directory(arguments.folder, error)) inspect_tokenizer(report);
  // Names in a broken file need not be UTF-8 once cut; the output always is.
  fmt::print("{}", arguments.json ? inspect_json(report).dump(2, ' ', false, Json::error_handler_t::replace) + "\n"
                                  : inspect_text(report));
  if (!report.usable) global.exit_code = 1;
}

}  // namespace

void register_inspect(CLI::App& app, GlobalOptions& global) {
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* command =
      app.add_subcommand("inspect", "formats, layers, sizes, memory per token, every problem of a checkpoint");
  command->add_option("DIR", arguments->folder, "checkpoint folder")->required();
  command->add_flag("--json", arguments->json, "one JSON object");
  command->callback([arguments, &global] { run_inspect(*arguments, global); });
}

}  // namespace dsv4::app
