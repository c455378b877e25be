// The quantiser of many rows that must be seen whole (RMS norm, global per row): a team of warps holds a row in registers.
//
// Persistent CTAs of several teams. A team has a stage in shared memory: once its row is in registers (and summed, or widened to SwiGLU's
// results), the copy engine fills the stage with the team's next row, so that loads go on behind the rest of the arithmetic, which reads no
// row twice. Warps of a team exchange their sums and maxima through shared memory, one named barrier each; teams never wait for each other.
//
// A StagedSource (quantize_ring.cuh) adds
//   Raw staged_raw(const uint8_t* stage, uint32_t count, uint32_t vec) const;
// and, where a vector's 16 numbers are its raw bf16 pairs (not kTraits.settles),
//   static void pairs(const Raw&, uint32_t (&pairs)[8]);
#pragma once

#include "ops/quantize/quantize_ring.cuh"

namespace dsv4 {

// How rows are cut up: kWarps warps a row, kVecs vectors of it a lane, so kWarps * 32 * kVecs vectors a row; up to kTeams teams a CTA.
template <int kWarps, int kVecs, int kTeams, int kCtasPerSm>
struct TeamCut {
  static constexpr int warps = kWarps, vecs = kVecs, teams = kTeams, ctas = kCtasPerSm;
  static constexpr int threads = kTeams * kWarps * 32;
  static constexpr uint32_t row_vecs = kWarps * 32 * kVecs;
};

// Shared memory of a CTA: stages, weights, then 16 bytes a warp for sums and 8 for maxima, then a barrier a team.
template <class Cut>
constexpr uint32_t team_smem_bytes(uint32_t teams, uint32_t vec_bytes, bool norm) {
  return teams * (Cut::row_vecs * vec_bytes + Cut::warps * 24 + 8) + (norm ? Cut::row_vecs * 64 : 0);
}

// sum / kCount, rounded once more.
template <uint32_t kCount>
__device__ __forceinline__ float mean_of(double sum) {
  if constexpr ((kCount & (kCount - 1)) == 0) return __fmul_rn(static_cast<float>(sum), 1.0f / kCount);
  return __fdiv_rn(static_cast<float>(sum), static_cast<float>(kCount));
}

// Sum of squares over a team, as staged_squares. over_team(part): the sum of the team's parts; once_more(): before it is called again.
template <int kVecs, class OverTeam, class OnceMore>
__device__ __forceinline__ double squares_of_pairs(const uint32_t (&pairs)[kVecs][8], const OverTeam& over_team,
                                                   const OnceMore& once_more) {
  const auto sum_of = [&](double high_scale, const auto& high_of) {
    double sums[4] = {};
#pragma unroll
    for (int k = 0; k < kVecs; ++k)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const double low = ptx::cvt_f64_bf16(pairs[k][j]);
        sums[j % 2] = __fma_rn(low, low, sums[j % 2]);
        const double high = high_of(pairs[k][j]);
        sums[2 + j % 2] = __fma_rn(high, high, sums[2 + j % 2]);
      }
    double sum = __fma_rn(sums[2] + sums[3], high_scale, sums[0] + sums[1]);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    return over_team(sum);
  };
  const double sum = sum_of(0x1p768, [](uint32_t pair) { return high_scaled_magnitude(pair); });
  if (squares_are_exact(sum)) return sum;
  once_more();
  return sum_of(1.0, [](uint32_t pair) { return ptx::cvt_f64_bf16(pair >> 16); });
}

template <class Source, RingMode kMode, class Cut>
__global__ void __launch_bounds__(Cut::threads, Cut::ctas)
    quantize_team(const Source source, const QuantizedRows out, const QuantizeShape shape, const RowNorm norm) {
  constexpr bool kNorm = kMode == RingMode::kNorm || kMode == RingMode::kNormRowGlobal;
  constexpr bool kRowGlobal = kMode == RingMode::kRowGlobal || kMode == RingMode::kNormRowGlobal;
  constexpr bool kPairs = !Source::kTraits.settles;
  constexpr int kWarps = Cut::warps, kVecs = Cut::vecs;
  constexpr uint32_t kThreads = kWarps * 32, kRowVecs = Cut::row_vecs,
                     kStageBytes = kRowVecs * Source::kTraits.vec_bytes;
  static_assert(kVecs % 2 == 0 && (kWarps == 1 || Cut::teams <= 15));  // named barriers 1 .. 15
  static_assert((kNorm || kRowGlobal) && (kPairs || !kNorm));  // who would queue the next row, and read the norm
  static_assert(!Source::kTraits.prepares && (!kPairs || !Source::kTraits.has_rows));
  extern __shared__ __align__(128) uint8_t team_smem[];
  const uint32_t teams = blockDim.x / kThreads, team = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
  const uint32_t warp = thread / 32, lane = threadIdx.x % 32;
  uint8_t* const stage = team_smem + team * kStageBytes;
  float4* const weights = reinterpret_cast<float4*>(team_smem + teams * kStageBytes);  // kNorm: [4][kRowVecs]
  double* const all_sums = reinterpret_cast<double*>(weights + (kNorm ? 4 * kRowVecs : 0));
  float* const all_maxima = reinterpret_cast<float*>(all_sums + teams * kWarps * 2);
  uint64_t* const full = reinterpret_cast<uint64_t*>(all_maxima + teams * kWarps * 2) + team;

  uint32_t row = team * gridDim.x + blockIdx.x;
  const uint32_t row_step = teams * gridDim.x;
  if (thread == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    // L2 is where all writes meet: a prefetch into it is no read and may run ahead of the kernel that still writes these rows.
    if (row < shape.num_rows) source.prefetch_piece(row, 0, kRowVecs);
  }
  if constexpr (kNorm) stage_weights(weights, norm.weight, kRowVecs);
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const auto queue = [&](uint32_t next) {
    if (thread == 0 && next < shape.num_rows) source.queue(stage, full, next, 0, kRowVecs, 0);
  };
  queue(row);

  // value of every warp of the team, combined; parity: of the row, so that a slow warp still finds the last row's values.
  const auto over_team = [&](auto value, auto* values, uint32_t parity, const auto& combine) {
    if constexpr (kWarps > 1) {
      auto* const mine = values + (team * 2 + parity) * kWarps;
      if (lane == 0) mine[warp] = value;
      ptx::named_barrier_sync(team + 1, kThreads);
      value = mine[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value = combine(value, mine[w]);
    } else {
      __syncwarp();
    }
    return value;
  };

  float global = out.global_mode == GlobalMode::kGiven ? out.global[0] : 1.0f;
  float rcp6 = nvfp4_rcp6({global});
  bool plain = nvfp4_global_is_plain(global);
  uint32_t parity = 0;
#pragma unroll 1
  for (; row < shape.num_rows; row += row_step, parity ^= 1) {
    const float row_factor = source.row_factor(row);
    if constexpr (!kRowGlobal)
      if (out.global_mode == GlobalMode::kPerRow) {
        global = out.global[row];
        rcp6 = nvfp4_rcp6({global});
        plain = nvfp4_global_is_plain(global);
      }
    ptx::mbarrier_wait(full, parity);
    typename Source::Raw raw[kVecs];
#pragma unroll
    for (int k = 0; k < kVecs; ++k) raw[k] = source.staged_raw(stage, kRowVecs, thread + k * kThreads);

    uint32_t pairs[kPairs ? kVecs : 1][8];  // kPairs
    float values[kPairs ? 1 : kVecs][16];   // else
    float amax[kVecs];
    const auto vector_of = [&](int k) {
      if constexpr (kPairs) {
        return vector_of_pairs(pairs[k]);
      } else {
        Vector16 v;
#pragma unroll
        for (int j = 0; j < 16; ++j) v.x[j] = values[k][j];
        finish_vector(v);
        return v;
      }
    };
    if constexpr (kPairs) {
#pragma unroll
      for (int k = 0; k < kVecs; ++k) source.pairs(raw[k], pairs[k]);
      if constexpr (kNorm) {
        const double sum = squares_of_pairs(
            pairs,
            [&](double part) { return over_team(part, all_sums, parity, [](double a, double b) { return a + b; }); },
            [&] {
              if constexpr (kWarps > 1) ptx::named_barrier_sync(team + 1, kThreads);
            });
        queue(row + row_step);
        const float factor = norm_factor(mean_of<kRowVecs * 16>(sum), norm.eps);
#pragma unroll
        for (int k = 0; k < kVecs; ++k)
          normalized_pairs(vector_of(k), weights, kRowVecs, thread + k * kThreads, factor, pairs[k]);
        if (out.y)
#pragma unroll
          for (int k = 0; k < kVecs; ++k)
            store_pieces<2>(out.y, 2 * (int64_t{row} * kRowVecs + thread + k * kThreads), true,
                            {pairs[k][0], pairs[k][1], pairs[k][2], pairs[k][3]},
                            {pairs[k][4], pairs[k][5], pairs[k][6], pairs[k][7]});
      }
#pragma unroll
      for (int k = 0; k < kVecs; ++k) amax[k] = vector_of(k).amax;
    } else {
#pragma unroll
      for (int k = 0; k < kVecs; ++k) {
        const Vector16 v = source.vector(raw[k], row, 0, row_factor);
#pragma unroll
        for (int j = 0; j < 16; ++j) values[k][j] = v.x[j];
        amax[k] = v.amax;
      }
    }
    if constexpr (kRowGlobal) {
      float largest = amax[0];
#pragma unroll
      for (int k = 1; k < kVecs; ++k) largest = ptx::max_nan(largest, amax[k]);
      if (isnan(largest)) {
        largest = 0;
#pragma unroll
        for (int k = 0; k < kVecs; ++k) largest = fmaxf(largest, amax_of_numbers(vector_of(k)));
      }
      // Magnitudes order as their bits.
      largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
      largest = over_team(largest, all_maxima, parity, [](float a, float b) { return fmaxf(a, b); });
      if constexpr (!kNorm) queue(row + row_step);
      global = nvfp4_global_scale(largest).value;
      if (thread == 0) out.row_global[row] = global;
      rcp6 = nvfp4_rcp6({global});
      plain = nvfp4_global_is_plain(global);
    }
    const int64_t first_v = int64_t{row} * kRowVecs + thread;
#pragma unroll
    for (int k = 0; k < kVecs; k += 2) {
      Vector16 v[2];
      uint4 codes[2];
      uint32_t sf[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) v[i] = vector_of(k + i), v[i].amax = amax[k + i];
      encode_vectors<RowFormat::kNvfp4>(v, global, rcp6, plain, codes, sf, [&](int i) { return vector_of(k + i); });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        write_codes<RowFormat::kNvfp4>(out, first_v + (k + i) * kThreads, codes[i]);
        out.sf[first_v + (k + i) * kThreads] = static_cast<uint8_t>(sf[i]);
      }
    }
  }
}

}  // namespace dsv4
