// Checks beside the timings: many shapes, token counts and routings, every tier, against tests/gpu/moe_reference.cuh.
#include <cstdio>

#include "gpu/moe_reference.cuh"
#include "moe_bench.h"

namespace dsv4::bench {
namespace {

using namespace dsv4::testing;

// One case, three times with poisoned output: every element inside its bounds and the same bits each time.
bool check_case(const ExpertSet& m, int64_t tokens, Routing routing, uint64_t seed, const Tier& tier,
                cudaStream_t stream, bool verbose) {
  const CaseShape& s = m.shape;
  const Layer l = make_layer(s, tokens, routing, seed, seed % 2 == 0, stream);
  const MoePlan plan = make_plan(s, tokens, tier);
  DeviceBuffer workspace(plan.workspace_bytes), first(l.y.bytes());
  gpu::fill(workspace.data(), 0xff, workspace.bytes(), stream);
  init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream);
  unsigned long long changed = 0;
  for (int run = 0; run < 3; ++run) {
    gpu::fill(l.y.data(), 0xff, l.y.bytes(), stream);
    run_layer(m, l, tier, plan, workspace, stream);
    DSV4_CUDA(cudaStreamSynchronize(stream));
    if (tokens == 0) return true;
    if (run == 0)
      gpu::copy_on_device(first.data(), l.y.data(), l.y.bytes(), stream);
    else
      changed += differences(first.data(), l.y.data(), tokens * s.hidden, stream);
  }
  const Comparison c = compare(l.y.as<bf16>(), make_reference(m.linear(), l, tier.act, stream), s.hidden, stream);
  const bool ok = c.outside == 0 && changed == 0;
  if (verbose || !ok)
    printf("%s %-6s T=%-5lld %-10s %-8s %s error %.2e, bound %.2e, outside %llu, changed %llu\n", ok ? "ok  " : "FAIL",
           s.name, (long long)tokens, kRoutingNames[int(routing)], tier.name.c_str(),
           tier.act == ActFormat::kBf16 ? "a16" : "a4", c.relative, c.width, c.outside, changed);
  fflush(stdout);
  return ok;
}

}  // namespace

int run_moe_check(uint64_t seed) {
  gpu::Stream stream;
  int failed = 0, count = 0;
  for (const char* name : {"small", "odd", "demo", "wide", "flash"}) {
    const CaseShape& s = *find_case_shape(name);
    const ExpertSet m = make_experts(s, seed, ScaleRange::kAll, stream.get());
    DSV4_GPU_REQUIRE("moe_bench", m.wrong_weights == 0, "%llu packed weights decode to another value", m.wrong_weights);
    const bool big = s.hidden >= 4096;
    for (const int64_t tokens :
         big ? std::vector<int64_t>{1, 8, 64, 300} : std::vector<int64_t>{0, 1, 2, 7, 33, 96, 129, 700})
      for (const Routing routing : {Routing::kUniform, Routing::kZipf, Routing::kOneExpert, Routing::kHoles,
                                    Routing::kNone, Routing::kDuplicates}) {
        if (big && tokens > 64 && routing != Routing::kZipf && routing != Routing::kOneExpert) continue;
        for (const Tier& tier : {Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}, Tier{"tiled", ActFormat::kNvfp4}}) {
          if (!tier_can_run(s, tokens, tier)) continue;
          ++count;
          failed += !check_case(m, tokens, routing, seed + 1000 * tokens + int(routing), tier, stream.get(), big);
        }
      }
    printf("%s: checked so far %d, failed %d\n", name, count, failed);
  }
  return failed != 0;
}

int run_moe_fuzz(int n, const std::string& shape) {
  gpu::Stream stream;
  const CaseShape* found = find_case_shape(shape);
  if (!found) throw_unknown("shape", shape);
  const CaseShape& s = *found;
  const ExpertSet m = make_experts(s, 5, ScaleRange::kAll, stream.get());
  constexpr int64_t kMaxTokens = 160;
  const auto bytes = [&](const Tier& t) { return make_plan(s, kMaxTokens, t).workspace_bytes; };
  DeviceBuffer workspace(std::max(bytes({"ring"}), bytes({"tiled"})) + 1024);
  init_moe_workspace(workspace.data(), plan_input(s, kMaxTokens, {}), stream.get());
  int failed = 0;
  for (int i = 0; i < n && failed < 5; ++i) {
    const uint64_t r = mix(i);
    const int64_t tokens = 1 + (r >> 8) % (r % 4 == 0 ? kMaxTokens : 24);
    const Layer l = make_layer(s, tokens, static_cast<Routing>((r >> 40) % 6), i, i % 2 == 0, stream.get());
    const Reference ref = make_reference(m.linear(), l, ActFormat::kBf16, stream.get());
    for (const Tier& tier : {Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}}) {
      if (!tier_can_run(s, tokens, tier)) continue;
      gpu::fill(l.y.data(), 0xff, l.y.bytes(), stream.get());
      run_layer(m, l, tier, make_plan(s, tokens, tier), workspace, stream.get());
      const Comparison c = compare(l.y.as<bf16>(), ref, s.hidden, stream.get());
      if (c.outside) {
        printf("FAIL case %d T=%lld %s %s: error %.3e, outside %llu\n", i, (long long)tokens,
               kRoutingNames[(r >> 40) % 6], tier.name.c_str(), c.relative, c.outside);
        ++failed;
      }
    }
  }
  printf("fuzz %s: %d cases, %d failures\n", s.name, n, failed);
  return failed != 0;
}

}  // namespace dsv4::bench
