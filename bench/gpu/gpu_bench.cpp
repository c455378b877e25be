// Graph timing, ceilings and reporting.
#include "gpu_bench.h"

#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "bench_kernels.h"

namespace dsv4::bench {
namespace {

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

// How often a graph goes round its buffers: its start and end, 5 us together, belong to a layer and not to one of its short calls.
int rounds(double bytes) { return bytes < 256e6 ? 4 : 1; }

// ", PDL 23.7 us 88.0 %, same-size copy 22.0 us": bandwidth cases only.
std::string beside(const Result& r) {
  if (r.pdl_us <= 0) return "";
  char text[96];
  std::snprintf(text, sizeof text, ", PDL %.2f us %.1f %%, same-size copy %.2f us", r.pdl_us,
                100 * r.share * r.us / r.pdl_us, r.same_size_us);
  return text;
}

}  // namespace

Bench::Bench(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0)
      quick_ = true;
    else if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc)
      json_path_ = argv[++i];
    else if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc)
      only_.emplace_back(argv[++i]);
    else
      throw_usage("{}: unknown argument {} (known: --json FILE, --quick, --only TEXT)", argv[0], argv[i]);
  }
  device_ = gpu::current_device();
  context_.stream = stream_.get();
  context_.num_sms = device_.num_sms;
  measure_ceilings();
}

double Bench::time_us(int copies, const std::function<void(const GpuContext&, int)>& body, bool dependent) {
  GpuContext context = context_;
  context.dependent = dependent;
  for (int copy = 0; copy < copies; ++copy) body(context, copy);
  stream_.synchronize();
  const gpu::Graph graph = gpu::Graph::capture(stream_, [&](cudaStream_t) {
    for (int copy = 0; copy < copies; ++copy) body(context, copy);
  });
  gpu::Event start, stop;
  for (int i = 0; i < 3; ++i) graph.launch(context.stream);
  std::vector<double> times;
  for (int i = 0; i < kReplays; ++i) {
    start.record(context.stream);
    graph.launch(context.stream);
    stop.record(context.stream);
    stop.synchronize();
    times.push_back(gpu::elapsed_us(start, stop) / copies);
  }
  return median(times);
}

bool Bench::wanted(const std::string& op, const std::string& shape) const {
  return only_.empty() || std::any_of(only_.begin(), only_.end(), [&](const std::string& text) {
           return (op + " " + shape + "$").find(text) != std::string::npos;
         });
}

void Bench::measure_ceilings() {
  const int64_t bytes = quick_ ? int64_t{256} << 20 : int64_t{2} << 30;
  gpu::DeviceBuffer from(bytes), to(bytes);
  fill_random(from.data(), bytes, 1, context_.stream);
  const double size = static_cast<double>(bytes);
  copy_ = 2 * size /
          time_us(2, [&](const GpuContext& c, int) { gpu::copy_on_device(to.data(), from.data(), bytes, c.stream); }) *
          1e6;
  own_copy_ =
      2 * size / time_us(2, [&](const GpuContext& c, int) { launch_copy(to.data(), from.data(), bytes, c); }) * 1e6;
  copy_ = std::max(copy_, own_copy_);
  read_ =
      size / time_us(2, [&](const GpuContext& c, int) { launch_read(from.data(), bytes, to.as<uint32_t>(), c); }) * 1e6;
  launch_us_ = time_us(64, [](const GpuContext& c, int) { launch_empty(c); });
  launch_pdl_us_ = time_us(
      64, [](const GpuContext& c, int) { launch_empty(c); }, true);
}

void Bench::stream(const std::string& op, const std::string& shape, double bytes, const std::string& ceiling,
                   int copies, const std::function<void(const GpuContext&, int)>& body) {
  if (!wanted(op, shape)) return;
  const int launches = copies * rounds(bytes);
  const auto turn = [&](const GpuContext& c, int i) { body(c, i % copies); };
  const double us = time_us(launches, turn), pdl_us = time_us(launches, turn, true);
  results_.push_back({op, shape, us, bytes, ceiling, bytes / us * 1e6 / (ceiling == "read" ? read_ : copy_), "", pdl_us,
                      same_size_copy_us(bytes, copies)});
}

// The faster of cudaMemcpyAsync and the bench's copy kernel.
double Bench::same_size_copy_us(double bytes, int copies) {
  const auto half = static_cast<int64_t>(bytes / 2) / 4096 * 4096;
  for (const auto& [key, us] : same_size_)
    if (key == std::pair{half, copies}) return us;
  std::vector<gpu::DeviceBuffer> from, to;
  for (int i = 0; i < copies; ++i) {
    fill_random(from.emplace_back(half).data(), half, static_cast<uint32_t>(i), context_.stream);
    to.emplace_back(half);
  }
  const int launches = copies * rounds(bytes);
  const double us =
      std::min(time_us(launches,
                       [&](const GpuContext& c, int i) {
                         gpu::copy_on_device(to[i % copies].data(), from[i % copies].data(), half, c.stream);
                       }),
               time_us(launches, [&](const GpuContext& c, int i) {
                 launch_copy(to[i % copies].data(), from[i % copies].data(), half, c);
               }));
  same_size_.push_back({{half, copies}, us});
  return us;
}

void Bench::latency(const std::string& op, const std::string& shape,
                    const std::function<void(const GpuContext&, int)>& body) {
  if (!wanted(op, shape)) return;
  results_.push_back({op, shape, time_us(32, body), 0, "", 0, "graph, L2 hot"});
  results_.push_back({op, shape, time_us(32, body, true), 0, "", 0, "graph with PDL, L2 hot"});
}

Bench::~Bench() {
  std::printf(
      "%s, %d SMs: copy %.0f GB/s (own copy kernel %.0f), read %.0f GB/s; empty kernel in a graph %.2f us, with PDL "
      "%.2f us\n",
      device_.name.c_str(), device_.num_sms, copy_ / 1e9, own_copy_ / 1e9, read_ / 1e9, launch_us_, launch_pdl_us_);
  nlohmann::json rows = nlohmann::json::array();
  for (const Result& r : results_) {
    const double gbps = r.bytes / r.us * 1e-3;
    if (r.bytes > 0)
      std::printf("%-28s %-44s %10.2f us %8.0f GB/s %5.1f %% of %s%s %s\n", r.op.c_str(), r.shape.c_str(), r.us, gbps,
                  100 * r.share, r.ceiling.c_str(), beside(r).c_str(), r.note.c_str());
    else
      std::printf("%-28s %-44s %10.2f us  %s\n", r.op.c_str(), r.shape.c_str(), r.us, r.note.c_str());
    nlohmann::json row{{"op", r.op}, {"shape", r.shape}, {"us", r.us}};
    if (r.bytes > 0)
      row.update({{"bytes", r.bytes}, {"gb_per_s", gbps}, {"ceiling", r.ceiling}, {"share_of_ceiling", r.share}});
    if (r.pdl_us > 0) row.update({{"us_pdl", r.pdl_us}, {"same_size_copy_us", r.same_size_us}});
    if (!r.note.empty()) row["note"] = r.note;
    rows.push_back(row);
  }
  if (json_path_.empty()) return;
  const nlohmann::json all{{"date", utc_now()},
                           {"device", device_.name},
                           {"num_sms", device_.num_sms},
                           {"copy_gb_per_s", copy_ / 1e9},
                           {"own_copy_gb_per_s", own_copy_ / 1e9},
                           {"read_gb_per_s", read_ / 1e9},
                           {"empty_kernel_us", launch_us_},
                           {"empty_kernel_pdl_us", launch_pdl_us_},
                           {"results", rows}};
  std::ofstream(json_path_) << all.dump(1) << "\n";
}

int run(int argc, char** argv, void (*body)(Bench&)) {
  try {
    const gpu::DeviceList list = gpu::find_devices();
    if (list.devices.empty()) throw_resource("no GPU: {}", list.absence);
    Bench bench(argc, argv);
    body(bench);
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return error.exit_code();
  }
}

}  // namespace dsv4::bench
