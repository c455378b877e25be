// Checks what all quantisers share, picks the kernel and its cut, launches.
#pragma once

#include "ops/quantize/quantize_ring.cuh"
#include "ops/quantize/quantize_team.cuh"

namespace dsv4 {

// How a long call is cut up.
struct RingPlan {
  uint32_t warps = 0;  // per CTA; 0: no ring, one of the other kernels
  uint32_t ctas_per_sm = 1;
  uint32_t piece_vecs = 0;
  uint32_t stages = 1;
};

// Shared memory that one CTA may have: 227 KiB on Hopper and data-centre Blackwell, 99 KiB on sm_120.
inline uint32_t ring_smem_limit() {
  int device = 0, bytes = 0;
  DSV4_CUDA(cudaGetDevice(&device));
  DSV4_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<uint32_t>(bytes);
}

// weight_vecs: vectors of norm weights, or 0.
inline uint32_t ring_smem_bytes(const RingPlan& plan, uint32_t stage_bytes, bool tiled, uint32_t weight_vecs) {
  return plan.warps * (plan.stages * stage_bytes + kRingMaxStages * 8 + (tiled ? 2 : 1) * plan.piece_vecs) +
         weight_vecs * 64;
}
inline bool has_norm(RingMode mode) { return mode == RingMode::kNorm || mode == RingMode::kNormRowGlobal; }

// Crossovers measured on an H200 (docs/kernels/quantize.md).
template <class Source>
RingPlan plan_ring(const Source& source, const QuantizedRows& out, const QuantizeShape& shape, RingMode mode,
                   const GpuContext& context) {
  constexpr uint32_t kLongVecs = 6 << 20;  // 192 MiB of bf16
  const bool is_long = shape.num_vecs >= kLongVecs, tiled = out.sf_layout == SfLayout::k128x4;
  const auto sms = static_cast<uint32_t>(context.num_sms);
  const bool aligned =
      reinterpret_cast<uintptr_t>(out.codes) % 16 == 0 && reinterpret_cast<uintptr_t>(out.sf) % 16 == 0;
  if (shape.vecs_per_row % 32 != 0 || !aligned || !source.stageable()) return {};
  const uint32_t limit = ring_smem_limit();
  const auto smem_of = [&](const RingPlan& plan) {
    return ring_smem_bytes(plan, plan.piece_vecs * Source::kTraits.vec_bytes + source.extra_bytes(plan.piece_vecs),
                           tiled, has_norm(mode) ? shape.vecs_per_row : 0);
  };
  if (mode == RingMode::kStream) {
    const RingPlan plan = tiled                       ? RingPlan{kTiledWarps, 3, 128, 1}
                          : !Source::kTraits.prepares ? RingPlan{24, 1, 64, 2}
                          : is_long                   ? RingPlan{24, 1, 256, 1}
                                                      : RingPlan{16, 1, 128, 2};
    // Shorter calls start and end sooner without the ring, unless a predecessor hides the start.
    const bool pays =
        is_long || (shape.num_vecs >= (512u << 10) && (tiled || context.dependent || Source::kTraits.prepares));
    return pays && smem_of(plan) <= limit ? plan : RingPlan{};
  }
  // A warp per row: the number of warps that leaves the fewest idle in the last round. Few rows: a CTA per row is done sooner.
  if (shape.num_rows <= 16 * sms || shape.num_vecs < Source::kTraits.ring_rows_from * sms) return {};
  RingPlan plan;
  uint32_t best = ~0u;
  for (const uint32_t warps : {24u, 16u, 12u, 8u, 6u}) {
    if (mode == RingMode::kRowGlobal && !Source::kTraits.settles && warps > 16) continue;
    if (plan.warps > 0 && warps < 16) break;  // fewer hide less latency
    const RingPlan candidate{warps, 1, shape.vecs_per_row, 1};
    const uint32_t cost = (shape.num_rows + sms * warps - 1) / (sms * warps) * warps;
    if (smem_of(candidate) <= limit && cost < best) best = cost, plan = candidate;
  }
  return plan;
}

template <class Source, RowFormat kFormat, RingMode kMode, bool kTiled, int kMaxThreads>
void launch_ring(const Source& source, const QuantizedRows& out, const QuantizeShape& shape, const RowNorm& norm,
                 const RingPlan& plan, const GpuContext& context) {
  RingShape ring{};
  const uint32_t parts = (shape.vecs_per_row + plan.piece_vecs - 1) / plan.piece_vecs;
  ring.stages = plan.stages;
  ring.piece_vecs = plan.piece_vecs;
  ring.stage_bytes = plan.piece_vecs * Source::kTraits.vec_bytes + source.extra_bytes(plan.piece_vecs);
  ring.by_parts = gpu::FastDiv(parts);
  ring.tiles = (shape.sf_matrix_rows + 127) / 128;
  ring.by_tiles = gpu::FastDiv(ring.tiles);
  ring.num_units = (kTiled ? shape.num_rows / shape.sf_matrix_rows * ring.tiles * 16 : shape.num_rows) * parts;
  const auto smem =
      static_cast<int>(ring_smem_bytes(plan, ring.stage_bytes, kTiled, has_norm(kMode) ? shape.vecs_per_row : 0));
  const uint32_t ctas = kTiled ? ring.num_units : (ring.num_units + plan.warps - 1) / plan.warps;
  const auto kernel = quantize_ring<Source, kFormat, kMode, kTiled, kMaxThreads>;
  gpu::allow_smem(kernel, smem);
  gpu::launch(kernel,
              {.grid = min(ctas, plan.ctas_per_sm * static_cast<uint32_t>(context.num_sms)),
               .block = plan.warps * 32,
               .smem_bytes = smem,
               .stream = context.stream,
               .dependent = context.dependent},
              source, out, shape, ring, norm);
}

// What a call of num_rows takes with these teams, in units of its own: rounds, and what one takes (measured on sm_90a, where all of them fit).
template <class Cut>
uint32_t team_cost(uint32_t num_rows, const GpuContext& context) {
  const auto at_once = static_cast<uint32_t>(context.num_sms * Cut::ctas * Cut::teams);
  return (num_rows + at_once - 1) / at_once * (3 * Cut::teams + 7);
}

// False where the shape is not one this cut is for.
template <class Source, RingMode kMode, class Cut>
bool launch_team(const Source& source, const QuantizedRows& out, const QuantizeShape& shape, const RowNorm& norm,
                 const GpuContext& context) {
  if (shape.vecs_per_row != Cut::row_vecs || reinterpret_cast<uintptr_t>(out.codes) % 8 != 0) return false;
  const auto smem_of = [](uint32_t teams) {
    return team_smem_bytes<Cut>(teams, Source::kTraits.vec_bytes, has_norm(kMode));
  };
  const uint32_t limit = ring_smem_limit();
  uint32_t teams = Cut::teams;
  while (teams > 0 && smem_of(teams) > limit) --teams;
  if (teams == 0) return false;
  const auto smem = static_cast<int>(smem_of(teams));
  const auto kernel = quantize_team<Source, kMode, Cut>;
  gpu::allow_smem(kernel, smem);
  gpu::launch(kernel,
              {.grid = min(static_cast<uint32_t>(context.num_sms * Cut::ctas), (shape.num_rows + teams - 1) / teams),
               .block = teams * Cut::warps * 32,
               .smem_bytes = smem,
               .stream = context.stream,
               .dependent = context.dependent},
              source, out, shape, norm);
  return true;
}

template <class Source, RingMode kMode>
bool launch_norm_team(const Source& source, const QuantizedRows& out, const QuantizeShape& shape, const RowNorm& norm,
                      const GpuContext& context) {
  using Few = TeamCut<2, 4, 8, 1>;  // more registers
  using Many = TeamCut<2, 4, 12, 1>;
  return team_cost<Few>(shape.num_rows, context) < team_cost<Many>(shape.num_rows, context)
             ? launch_team<Source, kMode, Few>(source, out, shape, norm, context)
             : launch_team<Source, kMode, Many>(source, out, shape, norm, context);
}

// Where teams are compiled for the row and win (docs/kernels/quantize.md, docs/kernels/swiglu_quantize.md). out: NVFP4, linear.
template <class Source>
bool launch_teams(const Source& source, const QuantizedRows& out, const QuantizeShape& shape, const RowNorm& norm,
                  RingMode mode, const GpuContext& context) {
  const auto sms = static_cast<uint32_t>(context.num_sms);
  if constexpr (Source::kTraits.settles) {
    if (shape.num_rows < 40 * sms) return false;
    if (shape.num_rows < 192 * sms)
      return launch_team<Source, RingMode::kRowGlobal, TeamCut<2, 2, 12, 1>>(source, out, shape, norm, context);
    return launch_team<Source, RingMode::kRowGlobal, TeamCut<1, 4, 16, 1>>(source, out, shape, norm, context);
  } else {
    if (mode == RingMode::kRowGlobal)
      return shape.num_rows >= 4 * sms &&
             launch_team<Source, RingMode::kRowGlobal, TeamCut<4, 2, 4, 2>>(source, out, shape, norm, context);
    if (shape.num_rows < 8 * sms) return false;
    return mode == RingMode::kNorm
               ? launch_norm_team<Source, RingMode::kNorm>(source, out, shape, norm, context)
               : launch_norm_team<Source, RingMode::kNormRowGlobal>(source, out, shape, norm, context);
  }
}

// One long row to quantize_stream, which then spares a division a vector.
template <class Source>
bool is_flat(const Source& source, const QuantizedRows& out, const QuantizeShape& shape) {
  if constexpr (Source::kTraits.has_rows)
    return false;
  else
    return source.contiguous(shape.vecs_per_row) && out.sf_layout == SfLayout::kLinear &&
           out.global_mode != GlobalMode::kPerRow && (out.format == RowFormat::kBf16 || !out.y);
}

template <class Source, RowFormat kFormat>
void launch_stream(const Source& source, const QuantizedRows& out, const QuantizeShape& shape,
                   const GpuContext& context) {
  // Enough CTAs to fill the machine several times over, then more vectors a thread.
  const uint32_t waves = shape.num_vecs / (static_cast<uint32_t>(context.num_sms) * kStreamThreads * 4),
                 vecs_per_thread = waves < 1   ? 1
                                   : waves > 4 ? 4
                                               : waves;
  const gpu::LaunchConfig config{
      .grid = (shape.num_vecs + kStreamThreads * vecs_per_thread - 1) / (kStreamThreads * vecs_per_thread),
      .block = kStreamThreads,
      .stream = context.stream,
      .dependent = context.dependent};
  if constexpr (!Source::kTraits.has_rows) {
    if (is_flat(source, out, shape))
      return gpu::launch(quantize_stream<Source, kFormat, true>, config, source, out, shape, vecs_per_thread);
  }
  gpu::launch(quantize_stream<Source, kFormat, false>, config, source, out, shape, vecs_per_thread);
}

// Where a row must be seen whole.
template <class Source>
void launch_rows(const char* op, const Source& source, const QuantizedRows& out, const QuantizeShape& shape,
                 const RowNorm& norm, const GpuContext& context) {
  const uint32_t cols = shape.vecs_per_row * 16;
  DSV4_GPU_REQUIRE(op, cols <= 16384, "cols = %u: at most 16384 where a row must be seen whole", cols);
  if constexpr (Source::kTraits.ring_rows) {
    const bool row_global = out.global_mode == GlobalMode::kComputeRow, linear = out.sf_layout == SfLayout::kLinear,
               plain_y = norm.weight || !out.y;
    const RingMode mode = !norm.weight ? RingMode::kRowGlobal : row_global ? RingMode::kNormRowGlobal : RingMode::kNorm;
    if constexpr (Source::kTraits.teams)
      if (linear && plain_y && out.format == RowFormat::kNvfp4 && launch_teams(source, out, shape, norm, mode, context))
        return;
    const RingPlan plan =
        linear && plain_y && out.format != RowFormat::kBf16 ? plan_ring(source, out, shape, mode, context) : RingPlan{};
    if (plan.warps > 0) {
      constexpr RowFormat kFp4 = RowFormat::kNvfp4, kFp8 = RowFormat::kFp8;
      if (mode == RingMode::kRowGlobal)
        return launch_ring < Source, kFp4, RingMode::kRowGlobal, false,
               Source::kTraits.settles ? 768 : 512 > (source, out, shape, norm, plan, context);
      if constexpr (Source::kTraits.ring_norm) {
        if (row_global)
          return launch_ring<Source, kFp4, RingMode::kNormRowGlobal, false, 768>(source, out, shape, norm, plan,
                                                                                 context);
        if (out.format == RowFormat::kFp8)
          return launch_ring<Source, kFp8, RingMode::kNorm, false, 768>(source, out, shape, norm, plan, context);
        return launch_ring<Source, kFp4, RingMode::kNorm, false, 768>(source, out, shape, norm, plan, context);
      }
    }
  }
  const uint32_t per_thread = cols <= 8192 ? 1 : 2;
  const gpu::LaunchConfig config{.grid = shape.num_rows,
                                 .block = (shape.vecs_per_row + 32 * per_thread - 1) / (32 * per_thread) * 32,
                                 .stream = context.stream,
                                 .dependent = context.dependent};
  gpu::launch(per_thread == 1 ? quantize_row<Source, 1> : quantize_row<Source, 2>, config, source, out, shape, norm);
}

template <class Source>
void launch_quantize(const char* op, const Source& source, const QuantizedRows& out, const RowNorm& norm,
                     int64_t num_rows, int64_t cols, const GpuContext& context) {
  DSV4_GPU_REQUIRE(op, cols > 0 && cols % (out.format == RowFormat::kFp8 ? kFp8ActBlock : kNvfp4GroupSize) == 0,
                   "cols = %lld", static_cast<long long>(cols));
  DSV4_GPU_REQUIRE(op, num_rows >= 0 && num_rows * (cols / 16) < (int64_t{1} << 31) - 4096,
                   "num_rows = %lld, cols = %lld: 2^31 groups at most", static_cast<long long>(num_rows),
                   static_cast<long long>(cols));
  DSV4_GPU_REQUIRE(op, out.format == RowFormat::kBf16 ? out.y != nullptr : out.codes && out.sf,
                   "an output pointer is null");
  DSV4_GPU_REQUIRE(op, out.global_mode == GlobalMode::kOne || out.format == RowFormat::kNvfp4,
                   "only kNvfp4 has a global scale");
  DSV4_GPU_REQUIRE(op, out.sf_layout == SfLayout::kLinear || out.format == RowFormat::kNvfp4,
                   "only kNvfp4 has the 128x4 layout");
  if (num_rows == 0) return;
  const int64_t matrix_rows = out.sf_matrix_rows ? out.sf_matrix_rows : num_rows;
  DSV4_GPU_REQUIRE(op, num_rows % matrix_rows == 0, "num_rows = %lld is not a multiple of sf_matrix_rows = %lld",
                   static_cast<long long>(num_rows), static_cast<long long>(matrix_rows));
  const QuantizeShape shape = make_quantize_shape(out, num_rows, cols);
  if (norm.weight || out.global_mode == GlobalMode::kComputeRow)
    return launch_rows(op, source, out, shape, norm, context);
  if constexpr (Source::kTraits.ring_stream)
    if (!out.y && !is_flat(source, out, shape)) {
      const RingPlan plan = plan_ring(source, out, shape, RingMode::kStream, context);
      constexpr RowFormat kFp4 = RowFormat::kNvfp4, kFp8 = RowFormat::kFp8;
      if (plan.warps > 0 && out.format == kFp4 && out.sf_layout == SfLayout::kLinear)
        return launch_ring<Source, kFp4, RingMode::kStream, false, 768>(source, out, shape, norm, plan, context);
      if constexpr (Source::kTraits.ring_tiled)
        if (plan.warps > 0 && out.format == kFp4)
          return launch_ring<Source, kFp4, RingMode::kStream, true, 768>(source, out, shape, norm, plan, context);
      if constexpr (Source::kTraits.prepares)
        if (plan.warps > 0 && out.format == kFp8)
          return launch_ring<Source, kFp8, RingMode::kStream, false, 768>(source, out, shape, norm, plan, context);
    }
  switch (out.format) {
    case RowFormat::kNvfp4:
      return launch_stream<Source, RowFormat::kNvfp4>(source, out, shape, context);
    case RowFormat::kFp8:
      return launch_stream<Source, RowFormat::kFp8>(source, out, shape, context);
    case RowFormat::kBf16:
      return launch_stream<Source, RowFormat::kBf16>(source, out, shape, context);
  }
}

}  // namespace dsv4
