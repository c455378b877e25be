// MoE layer on one Hopper GPU: ceilings, timings and checks.
//
//   dsv4_bench_gpu_moe [--quick] [--json FILE]   ceilings, then the Flash layer (scripts/gpu_check.sh)
//   dsv4_bench_gpu_moe time SHAPE [--only T,..] [--routing uniform,zipf] [--tier auto,before,ring,stream,tiled] [--act a16|a4]
//                        [--samples N] [--read 0|1] [--parts 0|1] [--shared 0|1] [--apart 0|1] [--sides 0|1] [--ceilings 0|1] [--json FILE]
//                        (tier before: auto, the shared expert in launches before; apart: a small kernel between layers; sides 0: weights placed without regard to
//                         the sides of the L2)
//   dsv4_bench_gpu_moe check [seed]        many shapes, token counts and routings, every tier, a16 and a4
//   dsv4_bench_gpu_moe fuzz N [SHAPE]      N random (T, routing) cases
//   dsv4_bench_gpu_moe run SHAPE T TIER    three plain launches, for profilers
//   dsv4_bench_gpu_moe copies              bulk copies alone, by chunk, depth and order
//   dsv4_bench_gpu_moe ceilings
#include <charconv>
#include <cstdio>
#include <fstream>
#include <limits>

#include "base/check.h"
#include "gpu/device.h"
#include "moe_bench.h"

using namespace dsv4;
using namespace dsv4::bench;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t from = 0; from <= text.size();) {
    const size_t comma = std::min(text.find(',', from), text.size());
    parts.push_back(text.substr(from, comma - from));
    from = comma + 1;
  }
  return parts;
}

int64_t count_of(const std::string& what, const std::string& text, int64_t least = 0) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  int64_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count < least || count > kMost)
    throw_usage("{}: expected a number from {} to {}, found '{}'", what, least, kMost, text);
  return count;
}
bool switch_of(const std::string& key, const std::string& value) {
  if (value != "0" && value != "1") throw_usage("{}: expected 0 or 1, found '{}'", key, value);
  return value == "1";
}
void require_gpu() {
  const gpu::DeviceList list = gpu::find_devices();
  if (list.devices.empty()) throw_resource("no GPU: {}", list.absence);
}

// JSON: one line for the ceilings, one per row.
int run_time(const MoeTimeOptions& options, bool with_ceilings, const std::string& json_path) {
  require_gpu();
  MoeCeilings ceilings;
  ceilings.read_gb_s = 4600, ceilings.matmul_tflops = 790;  // nominal, where they are not measured
  std::ofstream json;
  if (!json_path.empty()) {
    json.open(json_path);
    if (!json) throw_resource("{}: cannot be written", json_path);
  }
  if (with_ceilings) {
    ceilings = measure_moe_ceilings();
    std::printf("%s\n", moe_ceilings_line(ceilings).c_str());
    if (json) json << to_json(ceilings) << "\n";
  }
  std::printf("%s\n", moe_table_head().c_str());
  time_moe(options, ceilings, [&](const MoeTimeRow& row) {
    std::printf("%s\n", moe_table_line(row).c_str());
    std::fflush(stdout);
    if (json) json << to_json(row) << std::endl;
  });
  return 0;
}

int run_mode(const std::vector<std::string>& args) {
  const auto at = [&](size_t i, const char* otherwise) { return i < args.size() ? args[i] : std::string(otherwise); };
  const std::string mode = at(0, "");
  const auto number = [&](size_t i, const char* otherwise) { return count_of(mode, at(i, otherwise)); };
  if (mode == "check" || mode == "fuzz" || mode == "run" || mode == "copies" || mode == "ceilings") require_gpu();
  if (mode == "check") return run_moe_check(static_cast<uint64_t>(number(1, "1")));
  if (mode == "fuzz") return run_moe_fuzz(static_cast<int>(number(1, "100")), at(2, "small"));
  if (mode == "run") return run_moe_once(at(1, "flash"), number(2, "64"), at(3, "auto"));
  if (mode == "copies") return run_moe_copies();
  if (mode == "ceilings") {
    std::printf("%s\n", moe_ceilings_line(measure_moe_ceilings()).c_str());
    return 0;
  }
  MoeTimeOptions options;
  std::string json_path;
  bool ceilings = mode != "time";
  size_t i = 0;
  if (mode == "time") options.shape = at(1, "flash"), i = 2;
  for (; i < args.size(); ++i) {
    const std::string key = args[i];
    if (key == "--quick") {
      options.tokens = {1, 64};
      continue;
    }
    if (i + 1 == args.size()) throw_usage("{}: expected a value, found none", key);
    const std::string value = args[++i];
    if (key == "--only") {
      options.tokens.clear();
      for (const std::string& t : split(value)) options.tokens.push_back(count_of(key, t));
    } else if (key == "--routing") {
      options.routings = split(value);
    } else if (key == "--tier") {
      options.tiers = split(value);
      for (const std::string& tier : options.tiers)
        if (tier != "auto" && tier != "before" && tier != "ring" && tier != "stream" && tier != "tiled")
          throw_usage("{}: expected auto, before, ring, stream or tiled, found '{}'", key, tier);
    } else if (key == "--act") {
      if (value != "a4" && value != "a16") throw_usage("{}: expected a16 or a4, found '{}'", key, value);
      options.a4 = value == "a4";
    } else if (key == "--samples") {
      options.samples = static_cast<int>(count_of(key, value, 1));
    } else if (key == "--read") {
      options.read_only = switch_of(key, value);
    } else if (key == "--parts") {
      options.parts = switch_of(key, value);
    } else if (key == "--shared") {
      options.shared = switch_of(key, value);
    } else if (key == "--sides") {
      options.sides = switch_of(key, value);
    } else if (key == "--apart") {
      options.apart = switch_of(key, value);
    } else if (key == "--ceilings") {
      ceilings = switch_of(key, value);
    } else if (key == "--json") {
      json_path = value;
    } else {
      throw_usage("unknown argument {}, see the head of bench/gpu/moe/main.cpp", key);
    }
  }
  return run_time(options, ceilings, json_path);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run_mode({argv + 1, argv + argc});
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return error.exit_code();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
