// dsv4 bench: this machine's ceilings, then each op at the shapes of a model, as a table or JSON.
#include <cstdio>

#include "base/check.h"
#include "bench/bench.h"
#include "bench/model_bench.h"
#include "commands.h"
#include "terminal.h"
#if defined(DSV4_WITH_CUDA)
#include "gpu/device.h"
#include "moe_bench.h"
#endif

namespace dsv4::app {
namespace {

struct BenchFlags {
  std::string op = "all";
  std::string isa = "auto";
  std::string backend = "cpu";
  std::vector<std::string> routings{"uniform", "zipf"};
  int threads = 0;
  bool pin = false;
  bool json = false;
  bench::BenchOptions options;
  bench::ModelBenchOptions model;
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
  if (c.bf16_tile_flops > 0)
    std::printf(", %.0f bf16 tiles, %.0f int8 tiles", c.bf16_tile_flops / 1e9, c.int8_tile_ops / 1e9);
  std::printf("\n\n%-44s %5s %11s %8s %9s %7s %6s\n", "op", "rows", "time", "GB/s", "GFLOP/s", "floor", "read");
}

void print_result(const bench::BenchResult& r, const bench::Ceilings& c) {
  std::printf("%-44s %5lld %8.1f us %8.2f %9.1f %6.1f%% %5.1f%%\n", (r.op + " " + r.name).c_str(),
              static_cast<long long>(r.rows), r.seconds * 1e6, r.cost.bytes / r.seconds / 1e9,
              r.cost.flops / r.seconds / 1e9, 100.0 * r.floor_seconds / r.seconds,
              100.0 * r.cost.bytes / r.seconds / c.read_all);
  std::fflush(stdout);
}

void run_model(const BenchFlags& flags, const CpuContext& context, bool quiet) {
  const bench::Ceilings ceilings = bench::measure_ceilings(context);
  bench::ModelBenchOptions options = flags.model;
  options.shape = flags.options.shape;
  options.num_threads = flags.threads;
  options.pin_threads = flags.pin;
  options.isa = context.isa;
  ProgressLine line(quiet);
  const bench::ModelBenchResult r = bench::bench_model(options, [&](const std::string& text) { line.update(text); });
  line.finish();
  const double gb_per_second = r.bytes_per_token * r.decode_tokens_per_second / 1e9;
  if (flags.json) {
    std::printf("%s\n", Json{{"isa", cpu_isa_name(context.isa)},
                             {"threads", context.pool.num_threads()},
                             {"shape", options.shape},
                             {"folder", options.folder},
                             {"layers", options.num_layers},
                             {"prompt_tokens", options.prompt_tokens},
                             {"prefill_tokens_per_second", r.prefill_tokens_per_second},
                             {"decode_tokens_per_second", r.decode_tokens_per_second},
                             {"bytes_per_token", r.bytes_per_token},
                             {"load_seconds", r.load_seconds},
                             {"peak_resident_bytes", r.resident_bytes},
                             {"ceilings", bench::to_json(ceilings)}}
                            .dump(2)
                            .c_str());
    return;
  }
  std::printf("%s, %d threads, stream read %.1f GB/s\n", std::string(cpu_isa_name(context.isa)).c_str(),
              context.pool.num_threads(), ceilings.read_all / 1e9);
  std::printf("load     %8.2f s, %.2f GB resident\n", r.load_seconds, static_cast<double>(r.resident_bytes) / 1e9);
  std::printf("prefill  %8.1f tokens/s (%lld tokens)\n", r.prefill_tokens_per_second,
              static_cast<long long>(options.prompt_tokens));
  std::printf("decode   %8.1f tokens/s, %.1f MB of weights per token, %.1f GB/s = %.0f %% of the read stream\n",
              r.decode_tokens_per_second, r.bytes_per_token / 1e6, gb_per_second,
              1e11 * gb_per_second / ceilings.read_all);
}

// The MoE layer on a GPU; the other GPU benches are binaries of their own (bench/gpu).
void run_cuda(const BenchFlags& flags, bool rows_given) {
  if (flags.op != "moe")
    throw_usage("--backend cuda times moe only, not {}; see the dsv4_bench_gpu_* binaries", flags.op);
#if defined(DSV4_WITH_CUDA)
  const gpu::DeviceList list = gpu::find_devices();
  if (list.devices.empty()) throw_resource("--backend cuda: no GPU: {}", list.absence);
  if (list.devices[0].major != 9)
    throw_resource("--backend cuda: the MoE kernels need Hopper, found {}", list.devices[0].name);
  bench::MoeTimeOptions options;
  options.shape = flags.options.shape;
  options.routings = flags.routings;
  options.tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};
  if (rows_given) options.tokens = flags.options.rows;
  const bench::MoeCeilings ceilings = bench::measure_moe_ceilings();
  Json results = Json::array();
  if (!flags.json) std::printf("%s\n%s\n", bench::moe_ceilings_line(ceilings).c_str(), bench::moe_table_head().c_str());
  for (const bool a4 : {false, true}) {
    if (std::string(a4 ? "a4" : "a16").find(flags.options.filter) == std::string::npos) continue;
    options.a4 = a4;
    bench::time_moe(options, ceilings, [&](const bench::MoeTimeRow& row) {
      if (flags.json)
        results.push_back(bench::to_json(row));
      else
        std::printf("%s\n", bench::moe_table_line(row).c_str());
      std::fflush(stdout);
    });
  }
  if (flags.json)
    std::printf(
        "%s\n",
        Json{
            {"backend", "cuda"}, {"shape", options.shape}, {"ceilings", bench::to_json(ceilings)}, {"results", results}}
            .dump(2)
            .c_str());
#else
  (void)rows_given;
  throw_resource("--backend cuda: this build has no CUDA (configure with -DDSV4_CUDA=ON)");
#endif
}

std::string benchmark_names() {
  std::string names = "all, model";
  for (const bench::BenchOp& op : bench::bench_ops()) names += std::string(", ") + op.name;
  return names;
}

void run_bench(const BenchFlags& flags, bool quiet) {
  ThreadPool pool(flags.threads, flags.pin);
  const CpuContext context{pool, parse_isa(flags.isa)};
  bench::model_shape(flags.options.shape);  // refuse a wrong name before measuring
  if (flags.op == "model") return run_model(flags, context, quiet);
  bool known = flags.op == "all";
  for (const bench::BenchOp& op : bench::bench_ops()) known = known || flags.op == op.name;
  if (!known) throw_usage("no benchmark named {}, expected one of {}", flags.op, benchmark_names());

  const bench::Ceilings ceilings = bench::measure_ceilings(context);
  Json results = Json::array();
  if (!flags.json) print_ceilings(ceilings, context);
  bench::Bench bench(flags.options, context, ceilings, [&](const bench::BenchResult& result) {
    if (flags.json)
      results.push_back(bench::to_json(result, ceilings));
    else
      print_result(result, ceilings);
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

void register_bench(CLI::App& app, GlobalOptions& global) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* command = app.add_subcommand("bench", "time every op and set it against this machine's ceilings");
  command->add_option("op", flags->op, benchmark_names())->capture_default_str();
  command->add_option("--shape", flags->options.shape, "dimensions of which model: flash, pro, demo")
      ->capture_default_str();
  CLI::Option* rows = command->add_option("--rows", flags->options.rows, "rows of activations")
                          ->delimiter(',')
                          ->check(CLI::Range(1, 65536));
  command->add_option("--threads", flags->threads, "0: one per CPU")->check(CLI::Range(0, 4096))->capture_default_str();
  command->add_flag("--pin", flags->pin, "each worker thread keeps to one CPU");
  command->add_option("--isa", flags->isa, "auto, reference, avx2, avx512, amx")->capture_default_str();
  command->add_option("--filter", flags->options.filter, "only cases whose name contains this");
  command->add_option("--seconds", flags->options.min_seconds, "at least this long per case")
      ->check(CLI::Range(0.01, 60.0))
      ->capture_default_str();
  command
      ->add_option_function<int64_t>(
          "--working-set-mb", [flags](int64_t mb) { flags->options.working_set_bytes = mb << 20; },
          "weights that calls rotate over (1280); below the last-level cache it is the cache that is measured")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  command->add_flag("--json", flags->json, "one JSON object instead of a table");
  command->add_option("-m,--model", flags->model.folder,
                      "bench model: a checkpoint folder (default: a synthetic one of --shape)");
  command->add_option("--layers", flags->model.num_layers, "bench model: layers of the synthetic checkpoint, 0: all")
      ->check(CLI::Range(0, 1000));
  command->add_option("--experts", flags->model.num_experts, "bench model: experts of the synthetic checkpoint, 0: all")
      ->check(CLI::Range(0, 100000));
  command->add_option("--prompt-tokens", flags->model.prompt_tokens, "bench model: length of the prefill")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--backend", flags->backend, "cpu, or cuda (moe only)")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--routing", flags->routings, "cuda: uniform, zipf")
      ->delimiter(',')
      ->check(CLI::IsMember({"uniform", "zipf"}));
  command->callback([flags, rows, &global] {
    if (flags->backend == "cuda") return run_cuda(*flags, rows->count() > 0);
    run_bench(*flags, global.quiet);
  });
}

}  // namespace dsv4::app
