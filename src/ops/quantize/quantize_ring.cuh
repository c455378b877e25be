// The quantiser of long calls: persistent warps, each with a ring of row pieces in shared memory that the copy engine keeps full.
//
// A warp works alone: it waits for its oldest piece (a whole row where the row must be seen whole), quantises it from shared memory
// in as many passes as it needs, and queues the load of a later piece into the freed stage. Nothing waits for another warp, so loads
// never stop; only the 128x4 layout brings the eight warps of a CTA together, to write their scale bytes in full sectors.
//
// A StagedSource adds to a Source of quantize_kernels.cuh:
//   bool stageable() const;                   // these arguments allow it
//   uint32_t extra_bytes(uint32_t piece_vecs) const;   // of a stage, behind the vectors; a multiple of 16
//   int32_t ahead(uint32_t row) const;        // loaded early, handed to queue()
//   void queue(uint8_t* stage, uint64_t* barrier, uint32_t row, uint32_t first_vec, uint32_t count, int32_t ahead) const;   // one lane
//   void prefetch_piece(uint32_t row, uint32_t first_vec, uint32_t count) const;                                            // one lane
//   kTraits.prepares: a warp changes the stage before it reads vectors:
//   void prepare(uint8_t* stage, uint32_t count) const;
//   Vector16 staged(const uint8_t* stage, uint32_t count, uint32_t vec, float row_factor) const;
//   kTraits.settles: the first of two passes leaves its values in the stage:
//   void settle(uint8_t* stage, uint32_t count, uint32_t vec, const Vector16&) const;
//   Vector16 settled(const uint8_t* stage, uint32_t count, uint32_t vec) const;
#pragma once

#include "ops/quantize/quantize_kernels.cuh"

namespace dsv4 {

constexpr uint32_t kTiledWarps =
    8;  // two neighbouring rows and the six that lie 32, 64 and 96 further share a sector of 128x4 scales

constexpr uint32_t kRingMaxStages = 4;

enum class RingMode { kStream, kRowGlobal, kNorm, kNormRowGlobal };

struct RingShape {
  uint32_t stages, stage_bytes, piece_vecs;  // of a warp; the last piece of a row may be shorter
  uint32_t num_units;                        // pieces; 128x4: sets of eight
  uint32_t tiles;                            // 128x4: per matrix
  gpu::FastDiv by_parts, by_tiles;
};

struct RingPiece {
  uint32_t row, first_vec;
  bool exists, valid;  // exists, but pads a 128x4 matrix: not valid
};

// This warp's piece number step.
template <bool kTiled, bool kWholeRows>
__device__ __forceinline__ RingPiece ring_piece(const QuantizeShape& shape, const RingShape& ring, uint32_t step) {
  const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
  RingPiece piece;
  if constexpr (kTiled) {
    const uint32_t unit = step * gridDim.x + blockIdx.x, set = ring.by_parts.quotient(unit);
    const uint32_t tile_all = set / 16, matrix = ring.by_tiles.quotient(tile_all),
                   tile = tile_all - matrix * ring.tiles;
    const uint32_t m = tile * 128 + set % 16 * 2 + warp % 2 + warp / 2 * 32;
    piece.first_vec = (unit - set * ring.by_parts.divisor) * ring.piece_vecs;
    piece.row = matrix * shape.sf_matrix_rows + m;
    piece.exists = unit < ring.num_units;
    piece.valid = piece.exists && m < shape.sf_matrix_rows;
  } else {
    const uint32_t unit =
        kWholeRows ? (step * gridDim.x + blockIdx.x) * warps + warp : (step * warps + warp) * gridDim.x + blockIdx.x;
    piece.row = kWholeRows ? unit : ring.by_parts.quotient(unit);
    piece.first_vec = kWholeRows ? 0 : (unit - piece.row * ring.by_parts.divisor) * ring.piece_vecs;
    piece.exists = piece.valid = unit < ring.num_units;
  }
  return piece;
}

// Scale bytes of one warp's piece, linear layout: in shared memory already, written in long stores.
template <RowFormat kFormat>
__device__ __forceinline__ void write_sf_piece(const QuantizedRows& out, int64_t first_v, uint32_t count,
                                               const uint8_t* sf) {
  const uint32_t lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (kFormat == RowFormat::kNvfp4) {
#pragma unroll 1
    for (uint32_t i = lane; i < count / 16; i += 32)
      reinterpret_cast<uint4*>(out.sf + first_v)[i] = reinterpret_cast<const uint4*>(sf)[i];
  } else {
#pragma unroll 1
    for (uint32_t i = lane; i < count / 32; i += 32)
      reinterpret_cast<uint32_t*>(out.sf + first_v / 8)[i] = reinterpret_cast<const uint32_t*>(sf)[i];
  }
  __syncwarp();
}

// Scale bytes of a CTA's eight pieces, 128x4: sf [8][piece_vecs]. Two threads write the 32 bytes of four groups of eight rows.
__device__ __forceinline__ void write_sf_set(const QuantizedRows& out, const QuantizeShape& shape,
                                             const RingShape& ring, uint32_t step, const uint8_t* sf) {
  const uint32_t unit = step * gridDim.x + blockIdx.x, set = ring.by_parts.quotient(unit);
  const uint32_t first_vec = (unit - set * ring.by_parts.divisor) * ring.piece_vecs,
                 count = min(ring.piece_vecs, shape.vecs_per_row - first_vec);
  const uint32_t tile_all = set / 16, matrix = ring.by_tiles.quotient(tile_all), tile = tile_all - matrix * ring.tiles;
  uint8_t* to = out.sf + matrix * shape.sf_matrix_bytes + (int64_t{tile} * shape.quads_per_row + first_vec / 4) * 512 +
                set % 16 * 32;
  for (uint32_t i = threadIdx.x; i < count / 2; i += kTiledWarps * 32) {
    const uint32_t quad = i / 2, odd = i % 2;
    const auto word = [&](uint32_t j) {
      return *reinterpret_cast<const uint32_t*>(sf + (2 * j + odd) * ring.piece_vecs + 4 * quad);
    };
    *reinterpret_cast<uint4*>(to + quad * 512 + odd * 16) = {word(0), word(1), word(2), word(3)};
  }
}

__device__ __forceinline__ Vector16 load_bf16_vector(const uint8_t* from) {
  return vector_of_pairs(reinterpret_cast<const uint4*>(from)[0], reinterpret_cast<const uint4*>(from)[1]);
}
__device__ __forceinline__ void store_bf16_vector(uint8_t* to, const Vector16& v) {
  uint32_t pairs[8];
  pairs_of_vector(v, pairs);
  reinterpret_cast<uint4*>(to)[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  reinterpret_cast<uint4*>(to)[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
}

// ---- the norm of a staged bf16 row ----

// Magnitude of a pair's high bf16 times 2^-384 as binary64, put together from its bits. Exact for normal numbers; zeros and subnormals
// become less than 2^-510, infinities and NaN at least 2^-256.
__device__ __forceinline__ double high_scaled_magnitude(uint32_t pair) {
  return __longlong_as_double(
      static_cast<long long>(ptx::multiply_add_wide(pair & 0x7fff0000u, 1u << 29, uint64_t{0x20000000} << 32)));
}

// A sum of squares made with those: what zeros and subnormals add, less than 2^-252 each, is lost in the first bound; what is infinite
// passes the second.
__device__ __forceinline__ bool squares_are_exact(double sum) { return sum > 0x1p-100 && sum < 0x1p250; }

// Sum of squares; every lane gets it. Low halves are converted, high ones put together: conversions to binary64 run at an eighth of the
// speed of other instructions, which is fast enough for half of the numbers.
__device__ __forceinline__ double staged_squares(const uint8_t* stage, uint32_t count) {
  const uint4* pieces = reinterpret_cast<const uint4*>(stage);
  const auto sum_of = [&](double high_scale, const auto& high_of) {
    double sums[4] = {};
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < 2 * count; i += 64) {  // count is a multiple of 32
      const uint4 near = pieces[i], far = pieces[i + 32];
      const uint32_t pairs[8] = {near.x, near.y, near.z, near.w, far.x, far.y, far.z, far.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const double low = ptx::cvt_f64_bf16(pairs[j]), high = high_of(pairs[j]);
        sums[j % 2] = __fma_rn(low, low, sums[j % 2]);
        sums[2 + j % 2] = __fma_rn(high, high, sums[2 + j % 2]);
      }
    }
    double sum = __fma_rn(sums[2] + sums[3], high_scale, sums[0] + sums[1]);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    return sum;
  };
  const double sum = sum_of(0x1p768, [](uint32_t pair) { return high_scaled_magnitude(pair); });
  if (squares_are_exact(sum)) return sum;
  return sum_of(1.0, [](uint32_t pair) { return ptx::cvt_f64_bf16(pair >> 16); });
}

// Norm weights, widened once per CTA: quad k of vector v at [k * vecs + v].
__device__ __forceinline__ void stage_weights(float4* weights, const bf16* from, uint32_t vecs) {
  for (uint32_t i = threadIdx.x; i < 2 * vecs; i += blockDim.x) {
    const uint4 piece = __ldg(reinterpret_cast<const uint4*>(from) + i);
    float4* to = weights + i % 2 * 2 * vecs + i / 2;
    to[0] = {ptx::low_bf16(piece.x), ptx::high_bf16(piece.x), ptx::low_bf16(piece.y), ptx::high_bf16(piece.y)};
    to[vecs] = {ptx::low_bf16(piece.z), ptx::high_bf16(piece.z), ptx::low_bf16(piece.w), ptx::high_bf16(piece.w)};
  }
}
// normalized(), with weights staged that way; v: bf16 numbers.
__device__ __forceinline__ void normalized_pairs(const Vector16& v, const float4* weights, uint32_t vecs, uint32_t vec,
                                                 float factor, uint32_t (&pairs)[8]) {
  const float4* at = weights + vec;
#pragma unroll
  for (int k = 0; k < 4; ++k, at += vecs) {
    const float4 w = *at;
    const float* x = v.x + 4 * k;
    pairs[2 * k] = ptx::cvt_bf16x2(w.x * (x[0] * factor), w.y * (x[1] * factor));
    pairs[2 * k + 1] = ptx::cvt_bf16x2(w.z * (x[2] * factor), w.w * (x[3] * factor));
  }
}

template <int kValue>
struct Rounds {
  static constexpr int value = kValue;
};
// body(Rounds<n>, i): the lane's vectors i, i + 32 (n of them) of count, a multiple of 32. Two at a time mix their instructions.
template <class Body>
__device__ __forceinline__ void for_rounds(uint32_t count, const Body& body) {
  uint32_t i = threadIdx.x % 32;
#pragma unroll 1
  for (; i + 32 < count; i += 64) body(Rounds<2>{}, i);
  if (i < count) body(Rounds<1>{}, i);
}

template <class Source, RowFormat kFormat, RingMode kMode, bool kTiled, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads, 1)
    quantize_ring(const Source source, const QuantizedRows out, const QuantizeShape shape, const RingShape ring,
                  const RowNorm norm) {
  constexpr bool kNorm = kMode == RingMode::kNorm || kMode == RingMode::kNormRowGlobal;
  constexpr bool kRowGlobal = kMode == RingMode::kRowGlobal || kMode == RingMode::kNormRowGlobal;
  constexpr bool kWholeRows = kMode != RingMode::kStream;  // one stage, one piece a row
  extern __shared__ __align__(128) uint8_t ring_smem[];
  const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* const stages = ring_smem + warp * ring.stages * ring.stage_bytes;
  uint64_t* const full =
      reinterpret_cast<uint64_t*>(ring_smem + warps * ring.stages * ring.stage_bytes) + warp * kRingMaxStages;
  uint8_t* const sf_all =
      ring_smem + warps * (ring.stages * ring.stage_bytes + kRingMaxStages * 8);  // [kTiled ? 2 : 1][warps][piece_vecs]
  float4* const weights = reinterpret_cast<float4*>(sf_all + warps * ring.piece_vecs);  // kNorm: [4][vecs_per_row]

  const auto count_of = [&](const RingPiece& piece) {
    return kWholeRows ? shape.vecs_per_row : min(ring.piece_vecs, shape.vecs_per_row - piece.first_vec);
  };
  const auto queue = [&](const RingPiece& piece, uint32_t stage, int32_t ahead) {
    source.queue(stages + stage * ring.stage_bytes, full + stage, piece.row, piece.first_vec, count_of(piece), ahead);
  };
  if (lane == 0) {
#pragma unroll 1
    for (uint32_t s = 0; s < ring.stages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      // L2 is where all writes meet: a prefetch into it is no read and may run ahead of the kernel that still writes these rows.
      const RingPiece piece = ring_piece<kTiled, kWholeRows>(shape, ring, s);
      if (piece.valid) source.prefetch_piece(piece.row, piece.first_vec, count_of(piece));
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (kNorm) {
    stage_weights(weights, norm.weight, shape.vecs_per_row);
    __syncthreads();
  } else {
    __syncwarp();
  }
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (lane == 0)
#pragma unroll 1
    for (uint32_t s = 0; s < ring.stages; ++s) {
      const RingPiece piece = ring_piece<kTiled, kWholeRows>(shape, ring, s);
      if (piece.valid) queue(piece, s, source.ahead(piece.row));
    }

  const auto global_of = [&](const RingPiece& piece) {
    return out.global_mode == GlobalMode::kPerRow && piece.valid ? out.global[piece.row]
           : out.global_mode == GlobalMode::kGiven               ? out.global[0]
                                                                 : 1.0f;
  };
  RingPiece next = ring_piece<kTiled, kWholeRows>(shape, ring, 0);
  float next_global = global_of(next), next_factor = next.valid ? source.row_factor(next.row) : 1.0f;
  float rcp6 = nvfp4_rcp6({next_global});
  bool plain = nvfp4_global_is_plain(next_global);
  uint32_t stage = 0, phases = 0;
#pragma unroll 1
  for (uint32_t step = 0; next.exists; ++step) {
    const RingPiece piece = next;
    const float row_factor = next_factor;
    float global = next_global;
    next = ring_piece<kTiled, kWholeRows>(shape, ring, step + 1);
    next_global = global_of(next);
    if (next.valid) next_factor = source.row_factor(next.row);
    const uint32_t count = count_of(piece);
    uint8_t* const sf = sf_all + ((kTiled ? step % 2 * warps : 0) + warp) * ring.piece_vecs;
    const RingPiece later = kWholeRows ? next : ring_piece<kTiled, kWholeRows>(shape, ring, step + ring.stages);
    const int32_t ahead = later.valid ? source.ahead(later.row) : 0;
    if (piece.valid) {
      uint8_t* const data = stages + stage * ring.stage_bytes;
      const int64_t first_v = int64_t{piece.row} * shape.vecs_per_row + piece.first_vec;
      ptx::mbarrier_wait(full + stage, phases >> stage & 1);
      phases ^= 1u << stage;

      if constexpr (Source::kTraits.prepares) {
        source.prepare(data, count);
        __syncwarp();
      }
      float factor = 0;
      if constexpr (kNorm) factor = norm_factor(staged_squares(data, count), shape.vecs_per_row, norm.eps);
      const auto read = [&](uint32_t vec) {
        const Vector16 v = source.staged(data, count, vec, row_factor);
        if constexpr (kNorm) {
          uint32_t pairs[8];
          normalized_pairs(v, weights, shape.vecs_per_row, vec, factor, pairs);
          return vector_of_pairs(pairs);
        } else {
          return v;
        }
      };
      if constexpr (kRowGlobal) {
        float largest = 0;
        for_rounds(count, [&](auto rounds, uint32_t i) {
          constexpr int kVecs = decltype(rounds)::value;
          Vector16 v[kVecs];
#pragma unroll
          for (int k = 0; k < kVecs; ++k) v[k] = read(i + 32 * k);
#pragma unroll
          for (int k = 0; k < kVecs; ++k) {
            [[maybe_unused]] const uint32_t vec = i + 32 * k;
            largest = fmaxf(largest, amax_of_numbers(v[k]));
            if constexpr (kNorm)
              store_bf16_vector(data + vec * Source::kTraits.vec_bytes, v[k]);
            else if constexpr (Source::kTraits.settles)
              source.settle(data, count, vec, v[k]);
          }
        });
        // Magnitudes order as their bits.
        global = nvfp4_global_scale(__uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)))).value;
        if (lane == 0) out.row_global[piece.row] = global;
      }
      if (kRowGlobal || out.global_mode == GlobalMode::kPerRow) {
        rcp6 = nvfp4_rcp6({global});
        plain = nvfp4_global_is_plain(global);
      }
      const auto read_again = [&](uint32_t vec) {
        if constexpr (kRowGlobal && kNorm)
          return load_bf16_vector(data + vec * Source::kTraits.vec_bytes);
        else if constexpr (kRowGlobal && Source::kTraits.settles)
          return source.settled(data, count, vec);
        else
          return read(vec);
      };
      for_rounds(count, [&](auto rounds, uint32_t i) {
        constexpr int kVecs = decltype(rounds)::value;
        Vector16 v[kVecs];
        uint32_t vec[kVecs], scales[kVecs];
        uint4 codes[kVecs];
#pragma unroll
        for (int k = 0; k < kVecs; ++k) {
          vec[k] = i + 32 * k;
          v[k] = read_again(vec[k]);
        }
        if (kNorm && out.y)
#pragma unroll
          for (int k = 0; k < kVecs; ++k) write_bf16(out, first_v + vec[k], true, v[k]);
        encode_vectors<kFormat>(v, global, rcp6, plain, codes, scales, [&](int k) { return read_again(vec[k]); });
#pragma unroll
        for (int k = 0; k < kVecs; ++k) {
          write_codes<kFormat>(out, first_v + vec[k], codes[k]);
          if constexpr (kFormat == RowFormat::kNvfp4)
            sf[vec[k]] = static_cast<uint8_t>(scales[k]);
          else if (vec[k] % 8 == 0)
            sf[vec[k] / 8] = static_cast<uint8_t>(scales[k]);
        }
      });
      if constexpr (Source::kTraits.prepares || (kRowGlobal && (kNorm || Source::kTraits.settles)))
        ptx::fence_proxy_async();  // written by this warp, next by the copy engine
      __syncwarp();
    } else {
#pragma unroll 1
      for (uint32_t i = lane; i < count / 16; i += 32) reinterpret_cast<uint4*>(sf)[i] = {};
    }
    if (lane == 0 && later.valid) queue(later, stage, ahead);
    if constexpr (!kTiled) {
      write_sf_piece<kFormat>(out, int64_t{piece.row} * shape.vecs_per_row + piece.first_vec, count,
                              sf);  // always valid
    } else {
      __syncthreads();
      write_sf_set(out, shape, ring, step, sf_all + step % 2 * warps * ring.piece_vecs);
    }
    if (!kWholeRows) stage = stage + 1 == ring.stages ? 0 : stage + 1;
  }
}

}  // namespace dsv4
