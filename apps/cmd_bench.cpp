// dsv4 bench: this machine's ceilings, then each op at the shapes of a model, as a table or JSON.
#include <cstdio>

#include "base/check.h"
#include "bench/bench.h"
#include "commands.h"

namespace dsv4::app {
namespace {

struct BenchFlags {
  std::string op = "all";
  std::string isa = "auto";
  int threads = 0;
  bool json = false;
  bench::BenchOptions options;
};

CpuIsa parse_isa(const std::string& name) {
  if (name == "auto") return best_cpu_isa();
  const std::optional<CpuIsa> isa = cpu_isa_from_name(name);
  if (!isa) throw_usage("--isa {} is none of auto, reference, avx2, avx512, amx", name);
  if (*isa > best_cpu_isa()) throw_resource("--isa {}: this machine supports {}", name, cpu_isa_name(best_cpu_isa()));
  return *isa;
}

void print_ceilings(const bench::Ceilings& c, const CpuContext& context) {
  std::printf("%s, %d threads\n", std::string(cpu_isa_name(context.isa)).c_str(), context.pool.num_threads());
  std::printf("stream read  %7.1f GB/s one thread, %7.1f all\n", c.read_one / 1e9, c.read_all / 1e9);
  std::printf("stream copy  %7.1f GB/s one thread, %7.1f all (read + written)\n", c.copy_one / 1e9, c.copy_all / 1e9);
  std::printf("peak         %7.0f GFLOP/s f32", c.f32_flops / 1e9);
  if (c.bf16_dot_flops > 0) std::printf(", %.0f bf16 dot", c.bf16_dot_flops / 1e9);
  if (c.int8_dot_ops > 0) std::printf(", %.0f int8 dot", c.int8_dot_ops / 1e9);
  std::printf("\n\n%-44s %5s %11s %8s %9s %7s %6s\n", "op", "rows", "time", "GB/s", "GFLOP/s", "floor", "read");
}

void print_result(const bench::BenchResult& r, const bench::Ceilings& c) {
  std::printf("%-44s %5lld %8.1f us %8.2f %9.1f %6.1f%% %5.1f%%\n", (r.op + " " + r.name).c_str(),
              static_cast<long long>(r.rows), r.seconds * 1e6, r.cost.bytes / r.seconds / 1e9, r.cost.flops / r.seconds / 1e9,
              100.0 * r.floor_seconds / r.seconds, 100.0 * r.cost.bytes / r.seconds / c.read_all);
  std::fflush(stdout);
}

void run_bench(const BenchFlags& flags) {
  ThreadPool pool(flags.threads);
  const CpuContext context{pool, parse_isa(flags.isa)};
  bench::model_shape(flags.options.shape);  // refuse a wrong name before measuring
  bool known = flags.op == "all";
  for (const bench::BenchOp& op : bench::bench_ops()) known = known || flags.op == op.name;
  if (!known) throw_usage("no benchmark named {}", flags.op);

  const bench::Ceilings ceilings = bench::measure_ceilings(context);
  Json results = Json::array();
  if (!flags.json) print_ceilings(ceilings, context);
  bench::Bench bench(flags.options, context, ceilings, [&](const bench::BenchResult& result) {
    if (flags.json) results.push_back(bench::to_json(result, ceilings));
    else print_result(result, ceilings);
  });
  for (const bench::BenchOp& op : bench::bench_ops())
    if (flags.op == "all" || flags.op == op.name) op.run(bench);
  if (!flags.json) return;
  const Json document = {{"isa", std::string(cpu_isa_name(context.isa))},
                         {"threads", pool.num_threads()},
                         {"shape", flags.options.shape},
                         {"ceilings", bench::to_json(ceilings)},
                         {"results", results}};
  std::printf("%s\n", document.dump(2).c_str());
}

}  // namespace

void register_bench(CLI::App& app, GlobalOptions&) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* command = app.add_subcommand("bench", "time every op and set it against this machine's ceilings");
  std::string names = "all";
  for (const bench::BenchOp& op : bench::bench_ops()) names += std::string(", ") + op.name;
  command->add_option("op", flags->op, names)->capture_default_str();
  command->add_option("--shape", flags->options.shape, "dimensions of which model: flash, pro, demo")->capture_default_str();
  command->add_option("--rows", flags->options.rows, "rows of activations")->delimiter(',')->check(CLI::Range(1, 65536));
  command->add_option("--threads", flags->threads, "0: one per CPU")->check(CLI::Range(0, 4096))->capture_default_str();
  command->add_option("--isa", flags->isa, "auto, reference, avx2, avx512, amx")->capture_default_str();
  command->add_option("--filter", flags->options.filter, "only cases whose name contains this");
  command->add_option("--seconds", flags->options.min_seconds, "at least this long per case")->check(CLI::Range(0.01, 60.0))->capture_default_str();
  command->add_flag("--json", flags->json, "one JSON object instead of a table");
  command->callback([flags] { run_bench(*flags); });
}

}  // namespace dsv4::app
