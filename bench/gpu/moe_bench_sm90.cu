// MoE layer on one Hopper GPU: checks against a plain reference, then times whole layers inside a CUDA graph.
//
//   moe_bench [--quick] [--json FILE]   ceilings, then the Flash layer (scripts/gpu_check.sh)
//   moe_bench check [seed]      many shapes, token counts and routings, both tiers, a16 and a4
//   moe_bench fuzz N            N random (T, routing) cases on a small shape, 16-bit equality of the tiers and error bound
//   moe_bench time SHAPE [--only T,..] [--routing uniform|zipf] [--tier auto|stream8|stream16|tiled] [--act a16|a4] [--json FILE]
//   moe_bench run SHAPE T TIER  three plain launches, for profilers
//   moe_bench copies            bulk copies alone, by chunk, depth and order
//   moe_bench ceilings
//
// Method (docs/kernels/moe_sm90.md): R layers per graph, each with its own routing, input and output; L2 flushed before each
// replay by reading 384 MB; warm-up 0.3 s; median of 30; GB/s = weight bytes of activated experts / time.
//
// Over 500 lines because checks, fuzz and timing share the routing generator, the layer under test and the plain reference.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gpu/buffer.h"
#include "gpu/launch.h"
#include "gpu/stream.h"
#include "../../tests/gpu/moe_reference.cuh"
#include "ops/moe/moe_gpu.h"
#include "ops/moe/moe_pack_sm90.h"
#include "ops/moe/moe_stream_sm90.cuh"
#include "ops/moe/moe_workspace.h"

using namespace dsv4;
using namespace dsv4::testing;
using gpu::DeviceBuffer;

namespace {

struct Shape {
  const char* name;
  int hidden, inter, experts, topk;
};
constexpr Shape kShapes[] = {{"flash", 4096, 2048, 256, 6}, {"pro", 7168, 3072, 384, 6}, {"demo", 512, 256, 16, 4},
                             {"odd", 320, 192, 7, 3},       {"small", 128, 64, 5, 2},    {"wide", 1088, 576, 40, 8}};

const Shape& find_shape(const std::string& name) {
  for (const Shape& s : kShapes)
    if (name == s.name) return s;
  fprintf(stderr, "no shape %s\n", name.c_str());
  exit(2);
}

// Weights of one shape, linear (optional after packing) and packed.
struct Model {
  Shape shape;
  std::vector<DeviceBuffer> owned;
  LinearExperts linear{};
  DeviceBuffer fc1, fc2, alpha;
  sm90::MoeExperts experts() const { return {fc1.as<uint8_t>(), fc2.as<uint8_t>(), alpha.as<float>()}; }
};

Model make_model(const Shape& s, uint64_t seed, bool all_scales, cudaStream_t stream) {
  Model m;
  m.shape = s;
  const int64_t n = int64_t(s.experts) * s.hidden * s.inter;
  const auto bytes = [&](int64_t size) {
    m.owned.emplace_back(size);
    return m.owned.back().as<uint8_t>();
  };
  m.linear = {bytes(n / 2), bytes(n / 2), bytes(n / 2), bytes(n / 16), bytes(n / 16), bytes(n / 16), nullptr, s.hidden, s.inter, s.experts, s.topk};
  int i = 0;
  for (uint8_t* p : {m.linear.w1, m.linear.w3, m.linear.w2}) fill_random_bytes<<<1024, 256, 0, stream>>>(p, n / 2, seed + i++);
  // 24 codes from 32 to 240, or all 127 finite ones (zero and subnormals included)
  for (uint8_t* p : {m.linear.sf1, m.linear.sf3, m.linear.sf2})
    fill_random_sf<<<1024, 256, 0, stream>>>(p, n / 16, all_scales ? 0 : 0x60, all_scales ? 127 : 24, seed + i++);
  std::vector<float> globals(3 * s.experts);
  // sized so that gate and up are of order 4: part of them beyond the clamp of 10
  const float rms = (all_scales ? 90.0f : 130.0f) * 3.0f;
  for (int e = 0; e < s.experts; ++e) {
    const float vary = all_scales ? 0.75f + 0.5f * float(mix(seed + 77 * e) % 1000) / 1000.0f : 1.0f;
    globals[3 * e] = 4.0f * vary / (rms * std::sqrt(float(s.hidden)));
    globals[3 * e + 1] = 4.0f / vary / (rms * std::sqrt(float(s.hidden)));
    globals[3 * e + 2] = 1.0f * vary / (rms * std::sqrt(float(s.inter)));
  }
  m.owned.emplace_back(12 * s.experts);
  m.linear.globals = m.owned.back().as<float>();
  gpu::copy_to_device(m.linear.globals, globals.data(), 12 * s.experts, stream);
  m.fc1 = DeviceBuffer(s.experts * moe_fc1_bytes(s.hidden, s.inter));
  m.fc2 = DeviceBuffer(s.experts * moe_fc2_bytes(s.hidden, s.inter));
  m.alpha = DeviceBuffer(12 * s.experts);
  DeviceBuffer wrong(8);
  gpu::fill(wrong.data(), 0, 8, stream);
  const int64_t per = int64_t(s.hidden) * s.inter;
  for (int e = 0; e < s.experts; ++e) {
    const sm90::MoeLinearExpert expert{{m.linear.w1 + e * per / 2, m.linear.sf1 + e * per / 16, {globals[3 * e]}},
                                       {m.linear.w3 + e * per / 2, m.linear.sf3 + e * per / 16, {globals[3 * e + 1]}},
                                       {m.linear.w2 + e * per / 2, m.linear.sf2 + e * per / 16, {globals[3 * e + 2]}}};
    sm90::pack_moe_expert(expert, s.hidden, s.inter, e, m.fc1.as<uint8_t>(), m.fc2.as<uint8_t>(), m.alpha.as<float>(), stream);
    sm90::verify_moe_expert(expert, s.hidden, s.inter, e, m.fc1.as<uint8_t>(), m.fc2.as<uint8_t>(), m.alpha.as<float>(),
                            wrong.as<unsigned long long>(), stream);
  }
  unsigned long long count = 0;
  gpu::copy_to_host(&count, wrong.data(), 8, stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  if (count) {
    printf("FAIL pack %s: %llu weights decode wrongly\n", s.name, count);
    exit(1);
  }
  return m;
}

enum class Routing { kUniform, kZipf, kOneExpert, kHoles, kNone, kDuplicates };
const char* const kRoutingNames[] = {"uniform", "zipf", "one-expert", "holes", "none", "duplicates"};

std::vector<int32_t> make_routing(const Shape& s, int64_t tokens, Routing kind, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<double> unit(1e-12, 1.0);
  std::vector<int32_t> idx(tokens * s.topk);
  std::vector<std::pair<double, int>> score(s.experts);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int e = 0; e < s.experts; ++e) {
      const double gumbel = -std::log(-std::log(unit(rng)));
      score[e] = {gumbel + (kind == Routing::kZipf ? -std::log(double(e * 37 % s.experts + 1)) : 0.0), e};
    }
    std::partial_sort(score.begin(), score.begin() + s.topk, score.end(), std::greater<>());
    for (int k = 0; k < s.topk; ++k) {
      int32_t e = score[k].second;
      if (kind == Routing::kOneExpert) e = k == 0 ? 3 % s.experts : -1;
      if (kind == Routing::kHoles && rng() % 3 == 0) e = -1;
      if (kind == Routing::kNone) e = -1;
      if (kind == Routing::kDuplicates) e = rng() % 2;
      idx[t * s.topk + k] = e;
    }
  }
  return idx;
}
std::vector<float> make_weights(const Shape& s, int64_t tokens, uint64_t seed) {
  std::mt19937_64 rng(seed ^ 0xabcdef);
  std::vector<float> w(tokens * s.topk);
  for (float& v : w) v = 0.05f + 0.5f * float(rng() % 1000) / 1000.0f;
  return w;
}

struct Layer {  // inputs and output of one layer call
  DeviceBuffer x, idx, rho, shared, y;
  std::vector<int32_t> host_idx;
  int64_t tokens;
};
Layer make_layer(const Shape& s, int64_t tokens, Routing kind, uint64_t seed, bool shared, cudaStream_t stream) {
  Layer l;
  l.tokens = tokens;
  l.host_idx = make_routing(s, tokens, kind, seed);
  const std::vector<float> rho = make_weights(s, tokens, seed);
  l.x = DeviceBuffer(tokens * s.hidden * 2);
  l.y = DeviceBuffer(tokens * s.hidden * 2);
  l.idx = DeviceBuffer(tokens * s.topk * 4);
  l.rho = DeviceBuffer(tokens * s.topk * 4);
  if (tokens == 0) return l;
  fill_normal_bf16<<<256, 256, 0, stream>>>(l.x.as<bf16>(), tokens * s.hidden, 1.0f, seed + 1);
  if (shared) {
    l.shared = DeviceBuffer(tokens * s.hidden * 2);
    fill_normal_bf16<<<256, 256, 0, stream>>>(l.shared.as<bf16>(), tokens * s.hidden, 1.0f, seed + 2);
  }
  gpu::fill(l.y.data(), 0xff, l.y.bytes(), stream);
  gpu::copy_to_device(l.idx.data(), l.host_idx.data(), l.idx.bytes(), stream);
  gpu::copy_to_device(l.rho.data(), rho.data(), l.rho.bytes(), stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return l;
}

struct Tier {
  std::string name = "auto";
  ActFormat act = ActFormat::kBf16;
  int reserved = 0;
};
MoePlanInput plan_input(const Shape& s, int64_t tokens, const Tier& tier) {
  MoePlanInput in;
  in.num_tokens = tokens, in.hidden = s.hidden, in.inter = s.inter, in.num_experts = s.experts, in.num_topk = s.topk;
  in.act = tier.act;
  in.reserved_sms = tier.reserved;
  return in;
}
MoePlan make_plan(const Shape& s, int64_t tokens, const Tier& tier) {
  const MoePlanInput in = plan_input(s, tokens, tier);
  MoePlan plan = plan_moe(in);
  if (tier.name.rfind("tiled", 0) == 0) plan.tier = MoeTier::kTiled;
  if (tier.name == "stream8") plan.tier = MoeTier::kStream, plan.max_rows = 8;
  if (tier.name == "stream16") plan.tier = MoeTier::kStream, plan.max_rows = 16;
  plan.workspace_bytes = layout_moe_workspace(in, plan.tier).bytes;
  return plan;
}

void run_layer(const Model& m, const Layer& l, const Tier& tier, const MoePlan& plan, const DeviceBuffer& workspace, cudaStream_t stream) {
  MoeGpuArgs args{};
  args.experts = m.experts();
  args.shape = {m.shape.hidden, m.shape.inter, m.shape.experts, m.shape.topk};
  args.x = l.x.as<bf16>();
  args.topk_idx = l.idx.as<int32_t>();
  args.topk_weights = l.rho.as<float>();
  args.shared_y = l.shared.as<bf16>();
  args.y = l.y.as<bf16>();
  args.num_tokens = l.tokens;
  args.swiglu_limit = 10.0f;
  args.act = tier.act;
  args.workspace = workspace.data();
  args.workspace_bytes = workspace.bytes();
  moe_gpu(args, plan, stream);
}

struct Reference {
  DeviceBuffer x, x_global, h, h_q, h_global, slot_y, y;
};
Reference make_reference(const Model& m, const Layer& l, ActFormat act, cudaStream_t stream) {
  const Shape& s = m.shape;
  const int64_t slots = l.tokens * s.topk;
  const bool a4 = act == ActFormat::kNvfp4;
  Reference r;
  r.x = DeviceBuffer(l.tokens * s.hidden * 4), r.x_global = DeviceBuffer(l.tokens * 4), r.h = DeviceBuffer(slots * s.inter * 4);
  r.h_q = DeviceBuffer(slots * s.inter * 4), r.h_global = DeviceBuffer(slots * 4), r.slot_y = DeviceBuffer(slots * s.hidden * 4);
  r.y = DeviceBuffer(l.tokens * s.hidden * 4);
  gpu::fill(r.h.data(), 0, r.h.bytes(), stream);
  reference_rows<bf16><<<unsigned(l.tokens), 256, 0, stream>>>(l.x.as<bf16>(), l.tokens, s.hidden, a4, r.x.as<float>(), r.x_global.as<float>());
  reference_fc1<<<dim3(unsigned(slots), 32), 256, 0, stream>>>(m.linear, r.x.as<float>(), r.x_global.as<float>(), l.idx.as<int32_t>(),
                                                              l.rho.as<float>(), 10.0f, !a4, r.h.as<float>());
  reference_rows<float><<<unsigned(slots), 256, 0, stream>>>(r.h.as<float>(), slots, s.inter, a4, r.h_q.as<float>(), r.h_global.as<float>());
  reference_fc2<<<dim3(unsigned(slots), 32), 256, 0, stream>>>(m.linear, r.h_q.as<float>(), r.h_global.as<float>(), l.idx.as<int32_t>(), r.slot_y.as<float>());
  reference_combine<<<unsigned(l.tokens), 256, 0, stream>>>(m.linear, r.slot_y.as<float>(), l.idx.as<int32_t>(), l.shared.as<bf16>(), r.y.as<float>());
  DSV4_CUDA(cudaGetLastError());
  return r;
}

struct Comparison {
  double relative;
  unsigned long long bad;
};
Comparison compare(const bf16* y, const float* reference, const bf16* other, int64_t n, cudaStream_t stream) {
  DeviceBuffer sums(16), bad(8);
  gpu::fill(sums.data(), 0, 16, stream);
  gpu::fill(bad.data(), 0, 8, stream);
  compare_rows<<<256, 256, 0, stream>>>(y, reference, other, n, sums.as<double>(), bad.as<unsigned long long>());
  double host[2];
  unsigned long long count;
  gpu::copy_to_host(host, sums.data(), 16, stream);
  gpu::copy_to_host(&count, bad.data(), 8, stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return {host[1] > 0 ? std::sqrt(host[0] / host[1]) : std::sqrt(host[0]), count};
}

// One case; returns true if right. Runs the layer three times: poisoned each time, equal bits each time.
bool check_case(const Model& m, int64_t tokens, Routing routing, uint64_t seed, const Tier& tier, cudaStream_t stream, bool verbose) {
  const Shape& s = m.shape;
  Layer l = make_layer(s, tokens, routing, seed, seed % 2 == 0, stream);
  const MoePlan plan = make_plan(s, tokens, tier);
  DeviceBuffer workspace(plan.workspace_bytes);
  gpu::fill(workspace.data(), 0xff, workspace.bytes(), stream);
  init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream);
  DeviceBuffer first(l.y.bytes());
  bool ok = true;
  for (int run = 0; run < 3; ++run) {
    gpu::fill(l.y.data(), 0xff, l.y.bytes(), stream);
    run_layer(m, l, tier, plan, workspace, stream);
    const cudaError_t code = cudaStreamSynchronize(stream);
    if (code != cudaSuccess) {
      printf("FAIL %s T=%lld %s %s: %s\n", s.name, (long long)tokens, kRoutingNames[int(routing)], tier.name.c_str(), cudaGetErrorString(code));
      exit(1);
    }
    if (tokens == 0) return true;
    if (run == 0) gpu::copy_on_device(first.data(), l.y.data(), l.y.bytes(), stream);
    else if (compare(l.y.as<bf16>(), nullptr, first.as<bf16>(), tokens * s.hidden, stream).bad) ok = false;
  }
  const bool same = ok;
  const Reference r = make_reference(m, l, tier.act, stream);
  const Comparison c = compare(l.y.as<bf16>(), r.y.as<float>(), nullptr, tokens * s.hidden, stream);
  // Sums in another order move gate, up, h or y across a rounding boundary of bf16 (a step of 2^-8 relative) for a few per cent
  // of the elements, more with wgmma, which truncates its sums; in a4 a moved h can move an e2m1 code as well.
  const double bound = tier.act == ActFormat::kBf16 ? 2e-3 : 2e-2;
  ok = ok && c.bad == 0 && c.relative < bound;
  if (verbose || !ok)
    printf("%s %-6s T=%-5lld %-10s %-8s %s relative error %.2e%s%s\n", ok ? "ok  " : "FAIL", s.name, (long long)tokens,
           kRoutingNames[int(routing)], tier.name.c_str(), tier.act == ActFormat::kBf16 ? "a16" : "a4", c.relative,
           c.bad ? " NaN or unwritten" : "", same ? "" : " not reproducible");
  fflush(stdout);
  return ok;
}

int run_check(uint64_t seed) {
  gpu::Stream stream;
  int failed = 0, count = 0;
  for (const char* name : {"small", "odd", "demo", "wide", "flash"}) {
    const Shape& s = find_shape(name);
    const Model m = make_model(s, seed, true, stream.get());
    const bool big = s.hidden >= 4096;
    for (const int64_t tokens : big ? std::vector<int64_t>{1, 8, 64, 300} : std::vector<int64_t>{0, 1, 2, 7, 33, 96, 129, 700})
      for (const Routing routing : {Routing::kUniform, Routing::kZipf, Routing::kOneExpert, Routing::kHoles, Routing::kNone, Routing::kDuplicates}) {
        if (big && tokens > 64 && routing != Routing::kZipf && routing != Routing::kOneExpert) continue;
        for (const Tier& tier : {Tier{"stream8"}, Tier{"stream16"}, Tier{"tiled"}, Tier{"tiled", ActFormat::kNvfp4}}) {
          if (tier.name.rfind("tiled", 0) != 0 && tokens * s.topk > sm90::kStreamMaxSlots) continue;
          ++count;
          failed += !check_case(m, tokens, routing, seed + 1000 * tokens + int(routing), tier, stream.get(), big);
        }
      }
    printf("%s: checked so far %d, failed %d\n", name, count, failed);
  }
  return failed != 0;
}

int run_fuzz(int n, const std::string& shape) {
  gpu::Stream stream;
  const Shape& s = find_shape(shape);
  const Model m = make_model(s, 5, true, stream.get());
  const int64_t max_tokens = 160;
  int failed = 0;
  const auto bytes = [&](const Tier& t) { return make_plan(s, max_tokens, t).workspace_bytes; };
  DeviceBuffer workspace(std::max(bytes({"stream8"}), bytes({"tiled"})) + 1024);
  init_moe_workspace(workspace.data(), plan_input(s, max_tokens, {}), stream.get());
  for (int i = 0; i < n && failed < 5; ++i) {
    const uint64_t r = mix(i);
    const int64_t tokens = 1 + (r >> 8) % (r % 4 == 0 ? max_tokens : 24);
    const Routing routing = static_cast<Routing>((r >> 40) % 6);
    Layer l = make_layer(s, tokens, routing, i, i % 2 == 0, stream.get());
    const Reference ref = make_reference(m, l, ActFormat::kBf16, stream.get());
    for (const Tier& tier : {Tier{"stream8"}, Tier{"stream16"}, Tier{"tiled"}}) {
      if (tier.name.rfind("tiled", 0) != 0 && tokens * s.topk > sm90::kStreamMaxSlots) continue;
      gpu::fill(l.y.data(), 0xff, l.y.bytes(), stream.get());
      run_layer(m, l, tier, make_plan(s, tokens, tier), workspace, stream.get());
      const Comparison c = compare(l.y.as<bf16>(), ref.y.as<float>(), nullptr, tokens * s.hidden, stream.get());
      if (c.bad || c.relative > 4e-3) {
        printf("FAIL case %d T=%lld %s %s: relative %.3e, bad %llu\n", i, (long long)tokens, kRoutingNames[int(routing)], tier.name.c_str(), c.relative, c.bad);
        ++failed;
      }
    }
  }
  printf("fuzz %s: %d cases, %d failures\n", s.name, n, failed);
  return failed != 0;
}

// ---- timing ----

__global__ void read_bytes(const uint4* p, int64_t n, uint32_t* sink) {
  uint32_t v = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const uint4 q = __ldcs(p + i);
    v ^= q.x ^ q.y ^ q.z ^ q.w;
  }
  if (v == 0x12345678u) *sink = v;
}
__global__ void read_chunks(const uint4* p, int64_t n, uint32_t* sink) {  // one contiguous run per block
  const int64_t per = (n + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * per, end = min(n, begin + per);
  uint32_t v = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const uint4 q = __ldcs(p + i);
    v ^= q.x ^ q.y ^ q.z ^ q.w;
  }
  if (v == 0x12345678u) *sink = v;
}

template <class Body>
double median_us(gpu::Stream& stream, const DeviceBuffer& flush, int copies, int samples, double warm_seconds, const Body& body) {
  const gpu::Graph graph = gpu::Graph::capture(stream, [&](cudaStream_t s) {
    for (int i = 0; i < copies; ++i) body(i, s);
  });
  const auto start = std::chrono::steady_clock::now();
  do {
    graph.launch(stream.get());
    stream.synchronize();
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < warm_seconds);
  gpu::Event from, to;
  std::vector<double> times;
  for (int i = 0; i < samples; ++i) {
    read_bytes<<<1056, 256, 0, stream.get()>>>(flush.as<uint4>(), flush.bytes() / 16 - 1, flush.as<uint32_t>());
    from.record(stream.get());
    graph.launch(stream.get());
    to.record(stream.get());
    stream.synchronize();
    times.push_back(gpu::elapsed_us(from, to) / copies);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <class Traits>
void launch_stream(const sm90::MoeStreamArgs& args, int ctas, cudaStream_t stream) {
  const auto kernel = sm90::moe_stream_kernel<Traits>;
  gpu::allow_smem(kernel, Traits::kSmemBytes);
  gpu::LaunchConfig config;
  config.grid = ctas, config.block = Traits::kThreads, config.smem_bytes = Traits::kSmemBytes, config.stream = stream, config.dependent = true;
  gpu::launch(kernel, config, args);
}

sm90::MoeStreamArgs stream_args(const Model& m, const Layer& l, const Tier& tier, const DeviceBuffer& workspace) {
  const Shape& s = m.shape;
  const MoeWorkspace layout = layout_moe_workspace(plan_input(s, l.tokens, tier), MoeTier::kStream);
  char* base = workspace.as<char>();
  sm90::MoeStreamArgs a{};
  a.experts = m.experts();
  a.shape = {s.hidden, s.inter, s.experts, s.topk};
  a.x = l.x.as<bf16>(), a.topk_idx = l.idx.as<int32_t>(), a.topk_weights = l.rho.as<float>(), a.y = l.y.as<bf16>();
  a.h = reinterpret_cast<bf16*>(base + layout.h), a.slot_y = reinterpret_cast<bf16*>(base + layout.slot_y);
  a.fc1_done = reinterpret_cast<uint32_t*>(base + layout.fc1_done), a.fc2_done = reinterpret_cast<uint32_t*>(base + layout.fc2_done);
  a.exited = reinterpret_cast<uint32_t*>(base + layout.exited);
  a.num_tokens = int(l.tokens), a.swiglu_limit = 10.0f;
  return a;
}
#ifdef DSV4_MOE_TRACE
void print_trace(int ctas) {
  static unsigned long long t[256 * 8];
  DSV4_CUDA(cudaMemcpyFromSymbol(t, sm90::moe_trace, sizeof t));
  unsigned long long zero = ~0ull;
  for (int c = 0; c < ctas; ++c) zero = std::min(zero, t[c * 8 + 1]);
  const char* names[] = {"start", "inputs ready", "routed", "first task done", "first fc2 task", "math done", "roles done", "counted"};
  for (int i = 0; i < 8; ++i) {
    std::vector<double> v;
    for (int c = 0; c < ctas; ++c) v.push_back((double(t[c * 8 + i]) - double(zero)) * 1e-3);
    std::sort(v.begin(), v.end());
    printf("  %-16s min %7.2f  median %7.2f  max %7.2f us\n", names[i], v[0], v[v.size() / 2], v.back());
  }
}
#endif

struct TimeOptions {
  std::vector<int64_t> tokens{1, 8, 64, 256, 1024, 4096};
  std::vector<Routing> routings{Routing::kUniform, Routing::kZipf};
  std::vector<Tier> tiers{{}};
  std::string json;
  double stream_gbs = 4600, matmul_tflops = 790;
  int samples = 30;
  bool weights_only = true;
};

int run_time(const std::string& name, const TimeOptions& options) {
  gpu::Stream stream;
  const Shape& s = find_shape(name);
  Model m = make_model(s, 11, false, stream.get());
  DeviceBuffer flush(384 << 20);
  gpu::fill(flush.data(), 1, flush.bytes(), stream.get());
  FILE* json = options.json.empty() ? nullptr : fopen(options.json.c_str(), "a");
  printf("%-6s %-8s %-9s %6s %5s %5s %9s %8s %6s %7s %7s %9s\n", "shape", "routing", "tier", "T", "act", "max", "us", "floor", "share", "GB/s", "TFLOP/s", "stream us");
  for (const Routing routing : options.routings)
    for (const int64_t tokens : options.tokens)
      for (const Tier& tier : options.tiers) {
        const MoePlan plan = make_plan(s, tokens, tier);
        if (plan.tier == MoeTier::kStream && tokens * s.topk > sm90::kStreamMaxSlots) continue;
        const int copies = tokens <= 1 ? 16 : tokens <= 8 ? 12 : tokens <= 64 ? 6 : tokens <= 256 ? 4 : tokens <= 1024 ? 3 : 2;
        std::vector<Layer> layers;
        double activated = 0, largest = 0;
        for (int i = 0; i < copies; ++i) {
          layers.push_back(make_layer(s, tokens, routing, 1000 * tokens + 17 * i + int(routing), false, stream.get()));
          std::vector<int> count(s.experts);
          for (const int e : layers.back().host_idx)
            if (e >= 0) ++count[e];
          for (const int n : count) activated += (n > 0) / double(copies), largest = std::max(largest, double(n));
        }
        DeviceBuffer workspace(plan.workspace_bytes);
        init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream.get());
        const double us = median_us(stream, flush, copies, options.samples, 0.3, [&](int i, cudaStream_t on) { run_layer(m, layers[i], tier, plan, workspace, on); });
        double stream_us = 0;
        if (plan.tier == MoeTier::kStream && options.weights_only)
          stream_us = median_us(stream, flush, copies, options.samples, 0.1, [&](int i, cudaStream_t on) {
            launch_stream<sm90::StreamTraits<8, sm90::StreamMode::kWeightsOnly>>(stream_args(m, layers[i], tier, workspace), plan.ctas, on);
          });
#ifdef DSV4_MOE_TRACE
        if (plan.tier != MoeTier::kStream) stream_us = 0;
        else printf("math only: %.1f us\n", median_us(stream, flush, copies, 10, 0.05, [&](int i, cudaStream_t on) {
                 launch_stream<sm90::StreamTraits<8, sm90::StreamMode::kMathOnly>>(stream_args(m, layers[i], tier, workspace), plan.ctas, on);
               }));
        if (plan.tier == MoeTier::kStream) {
          median_us(stream, flush, copies, 5, 0.05, [&](int i, cudaStream_t on) {
            launch_stream<sm90::StreamTraits<8>>(stream_args(m, layers[i], tier, workspace), plan.ctas, on);
          });
          print_trace(plan.ctas);
        }
#endif
        const double weights = activated * 3.0 * s.hidden * s.inter * 0.5625;
        const double traffic = tokens * 4.0 * s.hidden + tokens * double(s.topk) * (4.0 * s.inter + 4.0 * s.hidden);
        const double flops = 6.0 * s.hidden * s.inter * s.topk * tokens;
        const double floor = 1e6 * std::max((weights + traffic) / (options.stream_gbs * 1e9), flops / (options.matmul_tflops * 1e12));
        printf("%-6s %-8s %-9s %6lld %5.0f %5.0f %9.1f %8.1f %5.1f%% %7.0f %7.1f %9.1f\n", s.name, kRoutingNames[int(routing)],
               (tier.name + (tier.act == ActFormat::kNvfp4 ? "/a4" : "")).c_str(), (long long)tokens, activated, largest, us, floor,
               100 * floor / us, weights / us * 1e-3, flops / us * 1e-6, stream_us);
        fflush(stdout);
        if (json)
          fprintf(json,
                  "{\"op\":\"moe\",\"shape\":\"%s\",\"routing\":\"%s\",\"tier\":\"%s\",\"act\":\"%s\",\"tokens\":%lld,\"activated\":%.1f,\"largest\":%.0f,"
                  "\"us\":%.2f,\"floor_us\":%.2f,\"share\":%.4f,\"gb_per_s\":%.1f,\"tflop_per_s\":%.2f,\"weights_only_us\":%.2f}\n",
                  s.name, kRoutingNames[int(routing)], tier.name.c_str(), tier.act == ActFormat::kNvfp4 ? "a4" : "a16", (long long)tokens, activated,
                  largest, us, floor, floor / us, weights / us * 1e-3, flops / us * 1e-6, stream_us);
      }
  if (json) fclose(json);
  return 0;
}

// A few plain launches, for profilers.
int run_once(const std::string& name, int64_t tokens, const Tier& tier) {
  gpu::Stream stream;
  const Shape& s = find_shape(name);
  const Model m = make_model(s, 11, false, stream.get());
  const Layer l = make_layer(s, tokens, Routing::kUniform, 1, false, stream.get());
  const MoePlan plan = make_plan(s, tokens, tier);
  DeviceBuffer workspace(plan.workspace_bytes);
  init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream.get());
  for (int i = 0; i < 3; ++i) run_layer(m, l, tier, plan, workspace, stream.get());
  stream.synchronize();
  return 0;
}

// How fast bulk copies into a ring of shared memory go: `chunk` bytes each, `stages` in flight per thread that copies.
__global__ void __launch_bounds__(128) ring_copy(const uint8_t* data, int64_t bytes, int chunk, int stages, int run, int issuers, bool evict_first) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t full[64];
  const int issuer = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages * issuers; ++i) ptx::mbarrier_init(&full[i], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0 || issuer >= issuers) return;
  const int chunks = int(bytes / chunk), self = blockIdx.x * issuers + issuer, all = gridDim.x * issuers;
  // runs of `run` chunks are contiguous and belong to one issuer
  const auto address = [&](int i) { return ((i / run) * all + self) * run + i % run; };
  uint64_t* mine = full + issuer * stages;
  uint8_t* buffer = ring + int64_t(issuer) * stages * chunk;
  const auto issue = [&](int i) {
    const int a = address(i);
    if (a >= chunks) return;
    const int s = i % stages;
    ptx::mbarrier_arrive_expect_tx(&mine[s], chunk);
    if (evict_first)
      ptx::bulk_load(buffer + s * chunk, data + int64_t(a) * chunk, chunk, &mine[s], ptx::L2Hint::kEvictFirst);
    else
      ptx::bulk_load(buffer + s * chunk, data + int64_t(a) * chunk, chunk, &mine[s]);
  };
  for (int i = 0; i < stages; ++i) issue(i);
  for (int i = 0; (i / run) * all * run < chunks; ++i) {
    if (address(i) >= chunks) continue;
    ptx::mbarrier_wait(&mine[i % stages], (i / stages) & 1);
    issue(i + stages);
  }
}
int run_copies() {
  gpu::Stream stream;
  DeviceBuffer data(int64_t{2415919104}), flush(384 << 20);
  gpu::fill(data.data(), 3, data.bytes(), stream.get());
  gpu::fill(flush.data(), 3, flush.bytes(), stream.get());
  gpu::allow_smem(ring_copy, 226 * 1024);
  struct Case { int chunk, kib, run, issuers, per_sm; bool evict; };
  for (const Case c : {Case{9216, 128, 16, 1, 1, true}, Case{9216, 128, 16, 1, 1, false}, Case{9216, 64, 16, 1, 1, false}, Case{9216, 200, 16, 1, 1, false},
                       Case{4608, 128, 32, 1, 1, false}, Case{2304, 128, 64, 1, 1, false}, Case{18432, 200, 8, 1, 1, false},
                       Case{9216, 200, 16, 2, 1, false}, Case{4608, 200, 32, 4, 1, false}, Case{9216, 100, 16, 1, 2, false}, Case{4608, 100, 32, 1, 2, false},
                       Case{9216, 200, 1, 1, 1, false}, Case{2048, 128, 72, 1, 1, false}, Case{8192, 200, 18, 1, 1, false}, Case{9216, 200, 256, 1, 1, false}}) {
    const int stages = std::min(64 / c.issuers, c.kib * 1024 / c.chunk / c.issuers);
    for (const int64_t bytes : {int64_t{621} << 20, data.bytes()}) {
      const double us = median_us(stream, flush, 1, 15, 0.03, [&](int, cudaStream_t s) {
        ring_copy<<<132 * c.per_sm, 128, c.per_sm == 1 ? 220 * 1024 : 105 * 1024, s>>>(data.as<uint8_t>(), bytes, c.chunk, stages, c.run, c.issuers, c.evict);
      });
      printf("ring copy chunk %5d in flight %3d KiB run %3d issuers %d CTAs/SM %d %s: %4lld MB %7.1f us %5.0f GB/s\n", c.chunk, stages * c.issuers * c.chunk * c.per_sm / 1024,
             c.run, c.issuers, c.per_sm, c.evict ? "evict-first" : "normal     ", (long long)(bytes >> 20), us, bytes / us * 1e-3);
    }
  }
  return 0;
}

int run_ceilings() {
  gpu::Stream stream;
  DeviceBuffer data(int64_t{3624} * 1000 * 1000), flush(384 << 20);
  gpu::fill(data.data(), 3, data.bytes(), stream.get());
  gpu::fill(flush.data(), 3, flush.bytes(), stream.get());
  for (const int64_t bytes : {int64_t{85} * 1000 * 1000, int64_t{620} * 1000 * 1000, data.bytes()}) {
    double best = 1e9;
    const char* what = "";
    for (const int blocks : {528, 1056, 2112}) {
      const double a = median_us(stream, flush, 1, 20, 0.05, [&](int, cudaStream_t s) { read_bytes<<<blocks, 256, 0, s>>>(data.as<uint4>(), bytes / 16, flush.as<uint32_t>()); });
      const double b = median_us(stream, flush, 1, 20, 0.05, [&](int, cudaStream_t s) { read_chunks<<<blocks, 512, 0, s>>>(data.as<uint4>(), bytes / 16, flush.as<uint32_t>()); });
      if (a < best) best = a, what = "grid-stride";
      if (b < best) best = b, what = "contiguous";
    }
    printf("read %lld MB: %.1f us, %.0f GB/s (%s)\n", (long long)(bytes / 1000000), best, bytes / best * 1e-3, what);
  }
  return 0;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t from = 0;
  while (from <= text.size()) {
    const size_t comma = std::min(text.find(',', from), text.size());
    parts.push_back(text.substr(from, comma - from));
    from = comma + 1;
  }
  return parts;
}

// What gpu_check.sh calls, [--quick] [--json FILE]: the ceilings, then the Flash layer.
int run_default(int argc, char** argv) {
  TimeOptions options;
  options.tiers = {{"auto", ActFormat::kBf16}};
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--quick") {
      options.tokens = {1, 64};
    } else if (key == "--json" && i + 1 < argc) {
      options.json = argv[++i];
    } else {
      fprintf(stderr, "unknown option %s\n", key.c_str());
      return 2;
    }
  }
  const int status = run_ceilings();
  return status != 0 ? status : run_time("flash", options);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  try {
    if (mode.empty() || mode.rfind("--", 0) == 0) return run_default(argc, argv);
    if (mode == "check") return run_check(argc > 2 ? strtoull(argv[2], nullptr, 10) : 1);
    if (mode == "fuzz") return run_fuzz(argc > 2 ? atoi(argv[2]) : 100, argc > 3 ? argv[3] : "small");
    if (mode == "run" && argc > 4) return run_once(argv[2], strtoll(argv[3], nullptr, 10), {argv[4]});
    if (mode == "copies") return run_copies();
    if (mode == "ceilings") return run_ceilings();
    if (mode == "time" && argc > 2) {
      TimeOptions options;
      ActFormat act = ActFormat::kBf16;
      std::string tiers = "auto";
      for (int i = 3; i + 1 < argc; i += 2) {
        const std::string key = argv[i], value = argv[i + 1];
        if (key == "--only") {
          options.tokens.clear();
          for (const std::string& t : split(value)) options.tokens.push_back(strtoll(t.c_str(), nullptr, 10));
        } else if (key == "--routing") {
          options.routings = {value == "zipf" ? Routing::kZipf : Routing::kUniform};
        } else if (key == "--tier") {
          tiers = value;
        } else if (key == "--act") {
          act = value == "a4" ? ActFormat::kNvfp4 : ActFormat::kBf16;
        } else if (key == "--json") {
          options.json = value;
        } else if (key == "--weights-only") {
          options.weights_only = value == "1";
        } else if (key == "--samples") {
          options.samples = atoi(value.c_str());
        } else {
          fprintf(stderr, "unknown option %s\n", key.c_str());
          return 2;
        }
      }
      options.tiers.clear();
      for (const std::string& t : split(tiers)) options.tiers.push_back({t, act});
      return run_time(argv[2], options);
    }
  } catch (const std::exception& e) {
    printf("error: %s\n", e.what());
    return 1;
  }
  fprintf(stderr, "usage: moe_bench check|fuzz|ceilings|time, see the head of bench/gpu/moe_bench_sm90.cu\n");
  return 2;
}
