// Tables and JSON of the MoE bench.
#include "base/check.h"
#include "moe_bench.h"

namespace dsv4::bench {

void throw_unknown(const char* what, const std::string& name) { throw_usage("no {} named {}", what, name); }

nlohmann::json to_json(const MoeCeilings& c) {
  return {{"op", "moe_ceilings"},
          {"device", c.device},
          {"read_gb_s", c.read_gb_s},
          {"read_85mb_gb_s", c.read_85mb_gb_s},
          {"read_620mb_gb_s", c.read_620mb_gb_s},
          {"copy_gb_s", c.copy_gb_s},
          {"matmul_tflops", c.matmul_tflops},
          {"matmul_library", c.matmul_library}};
}
nlohmann::json to_json(const MoeTimeRow& r) {
  return {{"op", "moe"},
          {"shape", r.shape},
          {"routing", r.routing},
          {"tier", r.tier},
          {"plan", r.plan},
          {"act", r.act},
          {"tokens", r.tokens},
          {"activated", r.activated},
          {"largest", r.largest},
          {"us", r.us},
          {"floor_us", r.floor_us},
          {"share", r.floor_us / r.us},
          {"nominal_floor_us", r.nominal_floor_us},
          {"gb_per_s", r.gb_per_s},
          {"tflop_per_s", r.tflop_per_s},
          {"read_us", r.read_us},
          {"loads_us", r.loads_us},
          {"math_us", r.math_us},
          {"shared_us", r.shared_us}};
}

std::string moe_ceilings_line(const MoeCeilings& c) {
  return fmt::format(
      "{}: read stream {:.0f} GB/s (3.6 GB), {:.0f} (620 MB), {:.0f} (85 MB), copy {:.0f} GB/s; BF16 8192^3 {}",
      c.device, c.read_gb_s, c.read_620mb_gb_s, c.read_85mb_gb_s, c.copy_gb_s,
      c.matmul_tflops > 0 ? fmt::format("{:.0f} TFLOP/s ({})", c.matmul_tflops, c.matmul_library)
                          : "not measured: " + c.matmul_library);
}
std::string moe_table_head() {
  return fmt::format("{:<6} {:<8} {:<9} {:>3} {:>6} {:>5} {:>5} {:>9} {:>8} {:>6} {:>7} {:>7} {:>9}{:>9}{:>9}{:>10}",
                     "shape", "routing", "tier", "act", "T", "experts", "most", "us", "floor", "share", "GB/s",
                     "TFLOP/s", "read us", "loads us", "math us", "shared us");
}
std::string moe_table_line(const MoeTimeRow& r) {
  const auto or_dash = [](double us) { return us > 0 ? fmt::format("{:.1f}", us) : std::string("-"); };
  return fmt::format(
      "{:<6} {:<8} {:<9} {:>3} {:>6} {:>7.1f} {:>5.0f} {:>9.1f} {:>8.1f} {:>5.1f}% {:>6.0f} {:>7.1f} "
      "{:>9}{:>9}{:>9}{:>10}",
      r.shape, r.routing, r.tier == "auto" ? r.plan.substr(0, r.plan.find(' ')) : r.tier, r.act, r.tokens, r.activated,
      r.largest, r.us, r.floor_us, 100 * r.floor_us / r.us, r.gb_per_s, r.tflop_per_s, or_dash(r.read_us),
      or_dash(r.loads_us), or_dash(r.math_us), or_dash(r.shared_us));
}

}  // namespace dsv4::bench
