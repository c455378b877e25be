// Times whole layers against their floor, a kernel that only reads the same weights, and the streaming tier's own copies.
#include <algorithm>
#include <cstdio>

#include "gpu/moe_case.cuh"
#include "gpu/launch.h"
#include "moe_bench.h"
#include "ops/moe/moe_ring_sm90.cuh"
#include "ops/moe/moe_stream_sm90.cuh"

namespace dsv4::bench {
namespace {

using namespace dsv4::testing;

const CaseShape& shape_named(const std::string& name) {
  const CaseShape* s = find_case_shape(name);
  if (!s) throw_unknown("shape", name);
  return *s;
}

template <class Traits>
void launch_mode(void (*kernel)(sm90::MoeStreamArgs), const sm90::MoeStreamArgs& args, int ctas, cudaStream_t stream) {
  gpu::allow_smem(kernel, Traits::kSmemBytes);
  gpu::LaunchConfig config;
  config.grid = ctas, config.block = Traits::kThreads, config.smem_bytes = Traits::kSmemBytes, config.stream = stream,
  config.dependent = true;
  gpu::launch(kernel, config, args);
}

sm90::MoeStreamArgs stream_args(const ExpertSet& m, const Layer& l, const Tier& tier, const DeviceBuffer& workspace) {
  const MoeWorkspace layout = layout_moe_workspace(plan_input(m.shape, l.tokens, tier), MoeTier::kStream);
  char* base = workspace.as<char>();
  sm90::MoeStreamArgs a{};
  a.experts = m.packed();
  a.shape = m.shape.kernel_shape();
  a.x = l.x.as<bf16>(), a.topk_idx = l.idx.as<int32_t>(), a.topk_weights = l.rho.as<float>(), a.y = l.y.as<bf16>();
  a.h = reinterpret_cast<bf16*>(base + layout.h), a.slot_y = reinterpret_cast<bf16*>(base + layout.slot_y);
  a.fc1_done = reinterpret_cast<uint32_t*>(base + layout.fc1_done),
  a.fc2_done = reinterpret_cast<uint32_t*>(base + layout.fc2_done);
  a.exited = reinterpret_cast<uint32_t*>(base + layout.exited),
  a.ticket = reinterpret_cast<uint32_t*>(base + layout.ticket_stream);
  a.drawn = reinterpret_cast<uint32_t*>(base + layout.drawn);
  a.num_tokens = int(l.tokens), a.swiglu_limit = 10.0f;
  return a;
}

#ifdef DSV4_MOE_TRACE
void print_trace(int ctas) {
  static unsigned long long t[256 * 8];
  DSV4_CUDA(cudaMemcpyFromSymbol(t, sm90::moe_trace, sizeof t));
  unsigned long long zero = ~0ull;
  for (int c = 0; c < ctas; ++c) zero = std::min(zero, t[c * 8 + 1]);
  const char* names[] = {"start", "inputs ready", "routed", "math done", "all tasks done", "combined"};
  for (int i = 0; i < 6; ++i) {
    std::vector<double> v;
    for (int c = 0; c < ctas; ++c) v.push_back((double(t[c * 8 + i]) - double(zero)) * 1e-3);
    std::sort(v.begin(), v.end());
    printf("  %-16s min %7.2f  median %7.2f  max %7.2f us\n", names[i], v[0], v[v.size() / 2], v.back());
  }
}
#endif

// The packed weights of the experts named, read once and thrown away: two CTAs of 512 threads an SM, contiguous chunks of 32 KB.
__global__ void __launch_bounds__(512)
    read_experts(const uint8_t* fc1, const uint8_t* fc2, int64_t bytes1, int64_t bytes2, const int32_t* expert,
                 int num_experts, uint32_t* sink) {
  constexpr int64_t kChunk = 32768;
  const int64_t chunks1 = (bytes1 + kChunk - 1) / kChunk, chunks2 = (bytes2 + kChunk - 1) / kChunk;
  uint32_t v = 0;
  for (int64_t c = blockIdx.x; c < num_experts * (chunks1 + chunks2); c += gridDim.x) {
    const bool second = c >= num_experts * chunks1;
    const int64_t w = second ? c - num_experts * chunks1 : c, per = second ? chunks2 : chunks1,
                  size = second ? bytes2 : bytes1;
    const int64_t begin = w % per * kChunk, end = min(size, begin + kChunk);
    const uint4* p = reinterpret_cast<const uint4*>((second ? fc2 : fc1) + expert[w / per] * size);
    uint4 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = begin / 16 + threadIdx.x + i * 512;
      q[i] = at < end / 16 ? __ldcs(p + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) v ^= q[i].x ^ q[i].y ^ q[i].z ^ q[i].w;
  }
  if (v == 0x12345678u) *sink = v;
}

Routing routing_named(const std::string& name) {
  for (int i = 0; i < 6; ++i)
    if (name == kRoutingNames[i]) return static_cast<Routing>(i);
  throw_unknown("routing", name);
}

}  // namespace

void time_moe(const MoeTimeOptions& options, const MoeCeilings& ceilings,
              const std::function<void(const MoeTimeRow&)>& report) {
  gpu::Stream stream;
  const CaseShape& s = shape_named(options.shape);
  const ExpertSet m =
      make_experts(s, 11, ScaleRange::kMiddle, stream.get(), options.sides ? SideSource::kFound : SideSource::kNone);
  DSV4_GPU_REQUIRE("moe_bench", m.wrong_weights == 0, "%llu packed weights decode to another value", m.wrong_weights);
  // Six shared experts in turn: more than L2 holds.
  std::vector<SharedExpert> shared;
  for (int i = 0; options.shared && i < 6; ++i) {
    shared.push_back(make_shared_expert(s.hidden, s.inter, 100 + 10 * i, stream.get()));
    DSV4_GPU_REQUIRE("moe_bench", shared.back().wrong_weights == 0, "%llu shared weights decode to another value",
                     shared.back().wrong_weights);
  }
  DeviceBuffer flush(384 << 20);
  gpu::fill(flush.data(), 1, flush.bytes(), stream.get());
  // Tokens outermost: a short row right after the longest of another routing found the clocks low (docs/kernels/moe_sm90.md, T = 1 zipf).
  for (const int64_t tokens : options.tokens)
    for (const std::string& routing : options.routings)
      for (const std::string& tier_name : options.tiers) {
        const Tier tier{tier_name, options.a4 ? ActFormat::kNvfp4 : ActFormat::kBf16, 0, options.shared ? s.inter : 0};
        const MoePlan plan = make_plan(s, tokens, tier);
        if (tokens * s.topk > moe_tier_max_slots(plan.tier)) continue;
        const int copies = tokens <= 1      ? 16
                           : tokens <= 8    ? 12
                           : tokens <= 64   ? 6
                           : tokens <= 256  ? 4
                           : tokens <= 1024 ? 3
                                            : 2;
        MoeTimeRow row{s.name, routing, tier_name, options.a4 ? "a4" : "a16", tokens, plan.to_string()};
        std::vector<Layer> layers;
        std::vector<std::vector<int32_t>> activated;
        for (int i = 0; i < copies; ++i) {
          layers.push_back(make_layer(s, tokens, routing_named(routing),
                                      1000 * tokens + 17 * i + int(routing_named(routing)), false, stream.get()));
          std::vector<int> count(s.experts);
          for (const int e : layers.back().host_idx)
            if (e >= 0 && e < s.experts) ++count[e];
          activated.emplace_back();
          for (int e = 0; e < s.experts; ++e) {
            if (count[e] > 0) activated.back().push_back(e);
            row.largest = std::max(row.largest, double(count[e]));
          }
          row.activated += double(activated.back().size()) / copies;
        }
        DeviceBuffer workspace(plan.workspace_bytes);
        init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream.get());
        row.us = moe_median_us(stream, flush, copies, options.samples, 0.3, [&](int i, cudaStream_t on) {
          MoeGpuArgs args = layer_args(m, layers[i], Tier{tier_name, tier.act}, workspace);
          if (options.shared) args.shared = shared[i % shared.size()].packed();
          if (options.apart) DSV4_CUDA(cudaMemsetAsync(flush.data(), 1, 4, on));
          moe_gpu(args, plan, on);
        });
        if (plan.shared == MoeSharedPlace::kBefore) {
          DeviceBuffer h(tokens * s.inter * 2);
          row.shared_us =
              moe_median_us(stream, flush, std::max(copies, 6), options.samples, 0.1, [&](int i, cudaStream_t on) {
                const Layer& l = layers[i % layers.size()];
                sm90::launch_moe_shared({shared[i % shared.size()].packed(), l.x.as<bf16>(), h.as<bf16>(),
                                         l.y.as<bf16>(), tokens, s.hidden, 10.0f},
                                        on);
              });
        }
        if (options.read_only) {
          std::vector<DeviceBuffer> lists;
          for (const auto& list : activated) {
            lists.emplace_back(static_cast<int64_t>(list.size()) * 4 + 4);
            gpu::copy_to_device(lists.back().data(), list.data(), static_cast<int64_t>(list.size()) * 4, stream.get());
          }
          stream.synchronize();
          row.read_us = moe_median_us(stream, flush, copies, options.samples, 0.1, [&](int i, cudaStream_t on) {
            read_experts<<<264, 512, 0, on>>>(m.fc1.as<uint8_t>(), m.fc2.as<uint8_t>(),
                                              moe_fc1_bytes(s.hidden, s.inter), moe_fc2_bytes(s.hidden, s.inter),
                                              lists[i].as<int32_t>(), static_cast<int>(activated[i].size()),
                                              flush.as<uint32_t>());
          });
        }
        if (plan.tier != MoeTier::kTiled && options.parts) {
          const auto time_mode = [&](auto ring, auto stream_traits, double seconds, int samples) {
            return moe_median_us(stream, flush, copies, samples, seconds, [&](int i, cudaStream_t on) {
              const sm90::MoeStreamArgs args = stream_args(m, layers[i], tier, workspace);
              if (plan.tier == MoeTier::kRing)
                launch_mode<decltype(ring)>(sm90::moe_ring_kernel<decltype(ring)>, args, plan.ctas, on);
              else
                launch_mode<decltype(stream_traits)>(sm90::moe_stream_kernel<decltype(stream_traits)>, args, plan.ctas,
                                                     on);
            });
          };
          using sm90::StreamMode;
          row.loads_us = time_mode(sm90::RingTraits<StreamMode::kWeightsOnly>(),
                                   sm90::StreamTraits<StreamMode::kWeightsOnly>(), 0.1, options.samples);
          row.math_us = time_mode(sm90::RingTraits<StreamMode::kMathOnly>(),
                                  sm90::StreamTraits<StreamMode::kMathOnly>(), 0.1, options.samples);
#ifdef DSV4_MOE_TRACE
          if (plan.tier == MoeTier::kStream) {
            time_mode(sm90::RingTraits<>(), sm90::StreamTraits<>(), 0.05, 5);
            print_trace(plan.ctas);
          }
#endif
        }
        const double weights = row.activated * 3.0 * s.hidden * s.inter * 0.5625;
        const double shared_weights = options.shared ? 3.0 * s.hidden * s.inter * sm90::kMoeFp8BlockBytes / 4096.0 : 0;
        const double traffic = tokens * 4.0 * s.hidden + tokens * double(s.topk) * (4.0 * s.inter + 4.0 * s.hidden);
        const double flops = 6.0 * s.hidden * s.inter * (s.topk + (options.shared ? 1 : 0)) * tokens;
        const auto floor = [&](double gb_s, double tflops) {
          return std::max((weights + shared_weights + traffic) / gb_s * 1e-3, tflops > 0 ? flops / tflops * 1e-6 : 0.0);
        };
        row.floor_us = floor(ceilings.read_gb_s, ceilings.matmul_tflops);
        row.nominal_floor_us = floor(4600, 790);
        row.gb_per_s = weights / row.us * 1e-3;
        row.tflop_per_s = flops / row.us * 1e-6;
        report(row);
      }
}

int run_moe_once(const std::string& shape, int64_t tokens, const std::string& tier_name) {
  gpu::Stream stream;
  const CaseShape& s = shape_named(shape);
  const ExpertSet m = make_experts(s, 11, ScaleRange::kMiddle, stream.get());
  const Tier tier{tier_name};
  const Layer l = make_layer(s, tokens, Routing::kUniform, 1, false, stream.get());
  const MoePlan plan = make_plan(s, tokens, tier);
  DeviceBuffer workspace(plan.workspace_bytes);
  init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream.get());
  for (int i = 0; i < 3; ++i) run_layer(m, l, tier, plan, workspace, stream.get());
  stream.synchronize();
  return 0;
}

}  // namespace dsv4::bench
