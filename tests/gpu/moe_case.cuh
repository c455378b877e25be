// What the MoE tests and benches run on: shapes, random experts (linear and packed), routings, one layer's inputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "codec/bf16.h"
#include "gpu/buffer.h"
#include "gpu/stream.h"
#include "ops/moe/moe_gpu.h"
#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_pack_sm90.h"
#include "ops/moe/moe_workspace.h"

namespace dsv4::testing {

using gpu::DeviceBuffer;

struct CaseShape {
  const char* name;
  int hidden, inter, experts, topk;
  sm90::MoeShape kernel_shape() const { return {hidden, inter, experts, topk}; }
};
constexpr CaseShape kCaseShapes[] = {{"flash", 4096, 2048, 256, 6}, {"pro", 7168, 3072, 384, 6},
                                     {"demo", 512, 256, 16, 4},     {"odd", 320, 192, 7, 3},
                                     {"small", 128, 64, 5, 2},      {"wide", 1088, 576, 40, 8}};
inline const CaseShape* find_case_shape(const std::string& name) {
  for (const CaseShape& s : kCaseShapes)
    if (name == s.name) return &s;
  return nullptr;
}

// All experts in linear layout, contiguous. w1/w3: [num_experts, inter, hidden], w2: [num_experts, hidden, inter].
struct LinearExperts {
  const uint8_t *w1, *w3, *w2;     // codes
  const uint8_t *sf1, *sf3, *sf2;  // ue4m3
  const float* globals;            // [num_experts, 3]
  int hidden, inter, num_experts, num_topk;
};

__host__ __device__ inline uint64_t mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

__global__ inline void fill_random_bytes(uint8_t* p, int64_t n, uint64_t seed) {
  for (int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * 8; i < n;
       i += int64_t(gridDim.x) * blockDim.x * 8) {
    const uint64_t r = mix(seed * 0x100000001b3ull + i);
    for (int j = 0; j < 8 && i + j < n; ++j) p[i + j] = static_cast<uint8_t>(r >> (8 * j));
  }
}
// Codes first .. first + count - 1.
__global__ inline void fill_random_codes(uint8_t* p, int64_t n, int first, int count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    p[i] = static_cast<uint8_t>(first + mix(seed * 0x100000001b3ull + i) % count);
}
__global__ inline void fill_normal_bf16(bf16* p, int64_t n, float sigma, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const uint64_t r = mix(seed * 0x100000001b3ull + i);
    const float u1 = (static_cast<float>(r & 0xffffff) + 1.0f) * 0x1p-24f,
                u2 = static_cast<float>((r >> 24) & 0xffffff) * 0x1p-24f;
    p[i] = encode_bf16(sigma * sqrtf(-2.0f * logf(u1)) * cospif(2.0f * u2));
  }
}

// The shared expert, FP8: e4m3 of every finite code but the largest, scales 2^-12 .. 2^-9 times what makes y of order 1.
struct SharedExpert {
  int hidden = 0, inter = 0;
  DeviceBuffer codes[3], scales[3], fc1, fc2, alpha;
  std::vector<float> host_scales[3];
  unsigned long long wrong_weights = 0;
  sm90::MoeSharedWeights packed() const { return {fc1.as<uint8_t>(), fc2.as<uint8_t>(), alpha.as<float>(), inter}; }
};
// NaN codes (0x7f, 0xff) become the next smaller number.
__global__ inline void fill_random_e4m3(uint8_t* p, int64_t n, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint8_t code = static_cast<uint8_t>(mix(seed * 0x100000001b3ull + i));
    p[i] = (code & 0x7f) == 0x7f ? code ^ 1 : code;
  }
}
inline SharedExpert make_shared_expert(int hidden, int inter, uint64_t seed, cudaStream_t stream) {
  SharedExpert e;
  e.hidden = hidden, e.inter = inter;
  const int64_t n = int64_t(hidden) * inter;
  for (int i = 0; i < 3; ++i) {
    const int rows = i == 2 ? hidden : inter, cols = i == 2 ? inter : hidden;
    e.codes[i] = DeviceBuffer(n);
    fill_random_e4m3<<<1024, 256, 0, stream>>>(e.codes[i].as<uint8_t>(), n, seed + i);
    const int middle = static_cast<int>(
        std::floor(std::log2((i == 2 ? 1.0 : 4.0) / (110.0 * std::sqrt(double(cols))))));  // rms of the codes
    for (int b = 0; b < (rows + 127) / 128 * ((cols + 127) / 128); ++b)
      e.host_scales[i].push_back(std::ldexp(1.0f, middle - 1 + static_cast<int>(mix(seed + 1000 * i + b) % 4)));
    e.scales[i] = DeviceBuffer(static_cast<int64_t>(e.host_scales[i].size()) * 4);
    gpu::copy_to_device(e.scales[i].data(), e.host_scales[i].data(), e.scales[i].bytes(), stream);
  }
  e.fc1 = DeviceBuffer(sm90::moe_shared_fc1_bytes(hidden, inter));
  e.fc2 = DeviceBuffer(sm90::moe_shared_fc2_bytes(hidden, inter));
  e.alpha = DeviceBuffer(12);
  DeviceBuffer wrong(8);
  gpu::fill(wrong.data(), 0, 8, stream);
  const auto matrix = [&](int i) { return sm90::MoeLinearFp8{e.codes[i].as<uint8_t>(), e.scales[i].as<float>()}; };
  const sm90::MoeLinearShared linear{matrix(0), matrix(1), matrix(2)};
  sm90::pack_moe_shared(linear, hidden, inter, e.fc1.as<uint8_t>(), e.fc2.as<uint8_t>(), e.alpha.as<float>(), stream);
  sm90::verify_moe_shared(linear, hidden, inter, e.fc1.as<uint8_t>(), e.fc2.as<uint8_t>(), e.alpha.as<float>(),
                          wrong.as<unsigned long long>(), stream);
  gpu::copy_to_host(&e.wrong_weights, wrong.data(), 8, stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return e;
}

// Weights of one shape. Globals are sized so that gate and up are of order 4 (part of them beyond the clamp of 10) and y of order 1.
struct ExpertSet {
  CaseShape shape{};
  DeviceBuffer codes[3], sf[3], globals;  // w1, w3, w2
  gpu::AlignedBuffer fc1, fc2;
  DeviceBuffer sides1, sides2, alpha;
  gpu::SmSides sms;
  std::vector<float> host_globals;
  unsigned long long wrong_weights = 0;  // that decode to another value than the linear form
  SharedExpert shared;                   // used by tiers with shared_inter

  LinearExperts linear() const {
    return {codes[0].as<uint8_t>(),
            codes[1].as<uint8_t>(),
            codes[2].as<uint8_t>(),
            sf[0].as<uint8_t>(),
            sf[1].as<uint8_t>(),
            sf[2].as<uint8_t>(),
            globals.as<float>(),
            shape.hidden,
            shape.inter,
            shape.experts,
            shape.topk};
  }
  sm90::MoeSides sides() const { return {sides1.as<uint16_t>(), sides2.as<uint16_t>(), sms}; }
  sm90::MoeExperts packed() const { return {fc1.as<uint8_t>(), fc2.as<uint8_t>(), alpha.as<float>(), sides()}; }
  void pack(int e, cudaStream_t stream) {
    sm90::pack_moe_expert(expert(e), shape.hidden, shape.inter, e, fc1.as<uint8_t>(), fc2.as<uint8_t>(),
                          alpha.as<float>(), sides(), stream);
  }
  sm90::MoeLinearExpert expert(int e) const {
    const int64_t per = int64_t(shape.hidden) * shape.inter;
    const auto matrix = [&](int i) {
      return sm90::MoeLinearMatrix{
          codes[i].as<uint8_t>() + e * per / 2, sf[i].as<uint8_t>() + e * per / 16, {host_globals[size_t(3 * e + i)]}};
    };
    return {matrix(0), matrix(1), matrix(2)};
  }
};

enum class ScaleRange {
  kMiddle,
  kAll
};  // 24 codes from 32 to 240, one global for all; every finite code, three globals per expert

// Where weights lie and which side SMs are on: as found on this GPU, not known, or anything (results may not depend on it).
enum class SideSource { kFound, kNone, kRandom };

inline void make_sides(ExpertSet& set, SideSource source, cudaStream_t stream) {
  if (source == SideSource::kNone) return;
  static const gpu::SmSides found = gpu::find_sm_sides(stream);
  const auto words_of = [&](const gpu::AlignedBuffer& matrices, uint64_t seed) {
    const int64_t count = matrices.bytes() / kMoeSlabPairBytes;
    DeviceBuffer words(count * 2);
    if (source == SideSource::kRandom)
      fill_random_codes<<<64, 256, 0, stream>>>(words.as<uint8_t>(), count * 2, 0, 256, seed);
    else
      sm90::find_moe_sides(found, matrices.as<uint8_t>(), matrices.bytes(), words.as<uint16_t>(), stream);
    return words;
  };
  set.sides1 = words_of(set.fc1, 77), set.sides2 = words_of(set.fc2, 78);
  set.sms = found;
  if (source == SideSource::kRandom)
    for (uint32_t i = 0; i < std::size(set.sms.bits); ++i) set.sms.bits[i] = static_cast<uint32_t>(mix(i));
}

inline ExpertSet make_experts(const CaseShape& shape, uint64_t seed, ScaleRange range, cudaStream_t stream,
                              SideSource sides = SideSource::kFound) {
  ExpertSet set;
  set.shape = shape;
  const bool all = range == ScaleRange::kAll;
  const int64_t n = int64_t(shape.experts) * shape.hidden * shape.inter;
  for (int i = 0; i < 3; ++i) {
    set.codes[i] = DeviceBuffer(n / 2), set.sf[i] = DeviceBuffer(n / 16);
    fill_random_bytes<<<1024, 256, 0, stream>>>(set.codes[i].as<uint8_t>(), n / 2, seed + i);
    fill_random_codes<<<1024, 256, 0, stream>>>(set.sf[i].as<uint8_t>(), n / 16, all ? 0 : 0x60, all ? 127 : 24,
                                                seed + 3 + i);
  }
  const float rms = (all ? 90.0f : 130.0f) * 3.0f;  // of e2m1 * sf
  for (int e = 0; e < shape.experts; ++e) {
    const float vary = all ? 0.75f + 0.5f * float(mix(seed + 77 * e) % 1000) / 1000.0f : 1.0f;
    set.host_globals.push_back(4.0f * vary / (rms * std::sqrt(float(shape.hidden))));
    set.host_globals.push_back(4.0f / vary / (rms * std::sqrt(float(shape.hidden))));
    set.host_globals.push_back(1.0f * vary / (rms * std::sqrt(float(shape.inter))));
  }
  set.globals = DeviceBuffer(12 * shape.experts);
  gpu::copy_to_device(set.globals.data(), set.host_globals.data(), 12 * shape.experts, stream);
  set.fc1 = gpu::AlignedBuffer(shape.experts * moe_fc1_bytes(shape.hidden, shape.inter), kMoeChunkPairBytes);
  set.fc2 = gpu::AlignedBuffer(shape.experts * moe_fc2_bytes(shape.hidden, shape.inter), kMoeChunkPairBytes);
  make_sides(set, sides, stream);
  set.alpha = DeviceBuffer(12 * shape.experts);
  DeviceBuffer wrong(8);
  gpu::fill(wrong.data(), 0, 8, stream);
  for (int e = 0; e < shape.experts; ++e) {
    set.pack(e, stream);
    sm90::verify_moe_expert(set.expert(e), shape.hidden, shape.inter, e, set.fc1.as<uint8_t>(), set.fc2.as<uint8_t>(),
                            set.alpha.as<float>(), set.sides(), wrong.as<unsigned long long>(), stream);
  }
  gpu::copy_to_host(&set.wrong_weights, wrong.data(), 8, stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return set;
}

enum class Routing { kUniform, kZipf, kOneExpert, kHoles, kNone, kDuplicates };
constexpr const char* kRoutingNames[] = {"uniform", "zipf", "one-expert", "holes", "none", "duplicates"};

// [tokens, topk]. Distinct experts per token but for kDuplicates; kHoles: a third of the entries name no expert, -1 or out of range.
inline std::vector<int32_t> make_routing(const CaseShape& s, int64_t tokens, Routing kind, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<double> unit(1e-12, 1.0);
  const int32_t no_expert[] = {-1, -2, s.experts, s.experts + 1000, INT32_MAX, INT32_MIN};
  std::vector<int32_t> idx;
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
      if (kind == Routing::kHoles && rng() % 3 == 0) e = rng() % 2 ? -1 : no_expert[rng() % 6];
      if (kind == Routing::kNone) e = -1;
      if (kind == Routing::kDuplicates) e = static_cast<int32_t>(rng() % 2);
      idx.push_back(e);
    }
  }
  return idx;
}

struct Layer {  // inputs and output of one call
  DeviceBuffer x, idx, rho, shared_y, y;
  std::vector<int32_t> host_idx;
  std::vector<float> host_rho;
  int64_t tokens = 0;
};
inline Layer make_layer(const CaseShape& s, std::vector<int32_t> idx, int64_t tokens, uint64_t seed, bool shared_y,
                        cudaStream_t stream) {
  Layer l;
  l.tokens = tokens;
  l.host_idx = std::move(idx);
  std::mt19937_64 rng(seed ^ 0xabcdef);
  for (int64_t i = 0; i < tokens * s.topk; ++i) l.host_rho.push_back(0.05f + 0.5f * float(rng() % 1000) / 1000.0f);
  if (tokens == 0) return l;
  l.x = DeviceBuffer(tokens * s.hidden * 2);
  l.y = DeviceBuffer(tokens * s.hidden * 2);
  l.idx = DeviceBuffer(tokens * s.topk * 4);
  l.rho = DeviceBuffer(tokens * s.topk * 4);
  fill_normal_bf16<<<256, 256, 0, stream>>>(l.x.as<bf16>(), tokens * s.hidden, 1.0f, seed + 1);
  if (shared_y) {
    l.shared_y = DeviceBuffer(tokens * s.hidden * 2);
    fill_normal_bf16<<<256, 256, 0, stream>>>(l.shared_y.as<bf16>(), tokens * s.hidden, 1.0f, seed + 2);
  }
  gpu::fill(l.y.data(), 0xff, l.y.bytes(), stream);
  gpu::copy_to_device(l.idx.data(), l.host_idx.data(), l.idx.bytes(), stream);
  gpu::copy_to_device(l.rho.data(), l.host_rho.data(), l.rho.bytes(), stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return l;
}
inline Layer make_layer(const CaseShape& s, int64_t tokens, Routing kind, uint64_t seed, bool shared_y,
                        cudaStream_t stream) {
  return make_layer(s, make_routing(s, tokens, kind, seed), tokens, seed, shared_y, stream);
}

// Which kernels a case runs: what the plan chooses ("auto"), or a tier by name.
struct Tier {
  std::string name = "auto";  // auto, ring, stream, tiled; before: auto with the shared expert before the routed ones
  ActFormat act = ActFormat::kBf16;
  int reserved_sms = 0;
  int shared_inter = 0;  // of ExpertSet::shared; 0: without
};
inline MoePlanInput plan_input(const CaseShape& s, int64_t tokens, const Tier& tier) {
  MoePlanInput in;
  in.num_tokens = tokens, in.hidden = s.hidden, in.inter = s.inter, in.num_experts = s.experts, in.num_topk = s.topk;
  in.act = tier.act;
  in.reserved_sms = tier.reserved_sms;
  in.shared_inter = tier.shared_inter;
  return in;
}
inline MoePlan make_plan(const CaseShape& s, int64_t tokens, const Tier& tier) {
  const MoePlanInput in = plan_input(s, tokens, tier);
  MoePlan plan = plan_moe(in);
  if (tier.name == "tiled") plan.tier = MoeTier::kTiled;
  if (tier.name == "ring") plan.tier = MoeTier::kRing;
  if (tier.name == "stream") plan.tier = MoeTier::kStream;
  plan.shared = moe_shared_place(plan.tier, in.shared_inter);
  if (tier.name == "before" && in.shared_inter > 0) plan.shared = MoeSharedPlace::kBefore;
  plan.workspace_bytes = layout_moe_workspace(in, plan.tier).bytes;
  return plan;
}
inline bool tier_can_run(const CaseShape& s, int64_t tokens, const Tier& tier) {
  if (tier.name == "ring") return tier.act == ActFormat::kBf16 && tokens * s.topk <= sm90::kRingMaxSlots;
  return tier.name != "stream" || (tier.act == ActFormat::kBf16 && tokens * s.topk <= sm90::kStreamMaxSlots);
}

inline MoeGpuArgs layer_args(const ExpertSet& experts, const Layer& l, const Tier& tier,
                             const DeviceBuffer& workspace) {
  MoeGpuArgs args{};
  args.experts = experts.packed();
  args.shape = experts.shape.kernel_shape();
  args.x = l.x.as<bf16>();
  args.topk_idx = l.idx.as<int32_t>();
  args.topk_weights = l.rho.as<float>();
  args.shared_y = l.shared_y.as<bf16>();
  if (tier.shared_inter > 0) args.shared = experts.shared.packed();
  args.y = l.y.as<bf16>();
  args.num_tokens = l.tokens;
  args.swiglu_limit = 10.0f;
  args.act = tier.act;
  args.workspace = workspace.data();
  args.workspace_bytes = workspace.bytes();
  return args;
}
inline void run_layer(const ExpertSet& experts, const Layer& l, const Tier& tier, const MoePlan& plan,
                      const DeviceBuffer& workspace, cudaStream_t stream) {
  moe_gpu(layer_args(experts, l, tier, workspace), plan, stream);
}

}  // namespace dsv4::testing
