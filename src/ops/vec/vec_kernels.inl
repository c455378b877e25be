// Body of the vector kernels in terms of Lanes, a compiler vector of DSV4_VEC_LANES floats. Included by vec_<isa>.cpp, which
// are compiled with that instruction set and with contraction on (a * b + c becomes one FMA; no bytes depend on it here).
#include <cstring>
#include <limits>

#include "ops/vec/vec_tables.h"

namespace dsv4::DSV4_VEC_NAMESPACE {
namespace {

constexpr int kLanes = DSV4_VEC_LANES;
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t IntLanes4 __attribute__((vector_size(16)));
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes), aligned(2)));

inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }
inline Lanes splat(float x) { return x - Lanes{}; }
inline Lanes maximum(Lanes a, Lanes b) { return a > b ? a : b; }

// Halves are added until four lanes are left; a fixed tree, in registers.
typedef float Quad __attribute__((vector_size(16)));
inline Quad quad_at(Lanes v, int first) {
  Quad q;
  std::memcpy(&q, reinterpret_cast<const float*>(&v) + first, sizeof(q));
  return q;
}
inline float fold_sum(Lanes v) {
  Quad q = quad_at(v, 0) + quad_at(v, 4);
  if constexpr (kLanes == 16) q += quad_at(v, 8) + quad_at(v, 12);
  q += __builtin_shuffle(q, IntLanes4{2, 3, 0, 1});
  return q[0] + q[1];
}
// exp(x) for x <= 0 or moderate: 2^k * p(r) with r = x - k ln2 split in two constants (Cody-Waite), degree-6 polynomial.
// x below -87.3 gives 0 (also -inf); NaN stays NaN through the polynomial.
inline Lanes exp_lanes(Lanes x) {
  const Lanes underflow = splat(-87.33654f);
  const Lanes clamped = x < underflow ? underflow : x;
  const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes shifted = clamped * splat(1.44269504f) + magic;
  const Lanes k = shifted - magic;
  const Lanes r = (clamped - k * splat(0.693145752f)) - k * splat(1.42860677e-6f);
  Lanes p = splat(1.0f / 720.0f);
  p = p * r + splat(1.0f / 120.0f);
  p = p * r + splat(1.0f / 24.0f);
  p = p * r + splat(1.0f / 6.0f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  const IntLanes exponent = ((IntLanes)shifted - (IntLanes)magic) << 23;
  const Lanes result = (Lanes)((IntLanes)p + exponent);
  return x < underflow ? Lanes{} : result;
}

float dot(const float* a, const float* b, int64_t n) {
  Lanes s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kLanes) * load(b + i + kLanes);
    s2 += load(a + i + 2 * kLanes) * load(b + i + 2 * kLanes);
    s3 += load(a + i + 3 * kLanes) * load(b + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += load(a + i) * load(b + i);
  float sum = fold_sum((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

float sum_squares(const float* x, int64_t n) { return dot(x, x, n); }

void scale(const float* x, const float* weight, float factor, int64_t n, float* y) {
  int64_t i = 0;
  if (weight != nullptr) {
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(weight + i) * (load(x + i) * factor));
    for (; i < n; ++i) y[i] = weight[i] * (x[i] * factor);
  } else {
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * factor);
    for (; i < n; ++i) y[i] = x[i] * factor;
  }
}

void combine(const float* const* x, const float* coeff, int num_terms, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes sum{};
    for (int j = 0; j < num_terms; ++j) sum += load(x[j] + i) * coeff[j];
    store(y + i, sum);
  }
  for (; i < n; ++i) {
    float sum = 0;
    for (int j = 0; j < num_terms; ++j) sum += x[j][i] * coeff[j];
    y[i] = sum;
  }
}

// Four heads by this many rows fill the register file with accumulators: 12 of 16 (AVX2), 24 of 32 (AVX-512).
constexpr int kTileRows = kLanes == 16 ? 6 : 3;

// kHeads x kRows dot products at once: each q and row vector is loaded once per kRows or kHeads multiply-adds.
template <int kHeads, int kRows>
inline void score_tile(const float* q, int64_t dim, const float* const* rows, float scale, float* scores,
                       int64_t stride) {
  Lanes sum[kHeads][kRows] = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    Lanes row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = load(rows[r] + i);
    for (int h = 0; h < kHeads; ++h) {
      const Lanes head = load(q + h * dim + i);
      for (int r = 0; r < kRows; ++r) sum[h][r] += head * row[r];
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int r = 0; r < kRows; ++r) {
      float total = fold_sum(sum[h][r]);
      for (int64_t k = i; k < dim; ++k) total += q[h * dim + k] * rows[r][k];
      scores[h * stride + r] = scale * total;
    }
}

template <int kHeads>
void score_heads(const float* q, int64_t dim, const float* const* rows, int64_t num_rows, float scale, float* scores,
                 int64_t stride) {
  int64_t r = 0;
  for (; r + kTileRows <= num_rows; r += kTileRows)
    score_tile<kHeads, kTileRows>(q, dim, rows + r, scale, scores + r, stride);
  for (; r < num_rows; ++r) score_tile<kHeads, 1>(q, dim, rows + r, scale, scores + r, stride);
}

void attend_scores(const float* q, int num_heads, int64_t dim, const float* const* rows, int64_t num_rows, float scale,
                   float* scores, int64_t stride) {
  int h = 0;
  for (; h + 4 <= num_heads; h += 4)
    score_heads<4>(q + h * dim, dim, rows, num_rows, scale, scores + h * stride, stride);
  for (; h + 2 <= num_heads; h += 2)
    score_heads<2>(q + h * dim, dim, rows, num_rows, scale, scores + h * stride, stride);
  for (; h < num_heads; ++h) score_heads<1>(q + h * dim, dim, rows, num_rows, scale, scores + h * stride, stride);
}

// kHeads outputs over kCols vectors of channels, summed over all rows in order.
template <int kHeads, int kCols>
inline void value_tile(const float* p, int64_t p_stride, int64_t dim, const float* const* rows, int64_t num_rows,
                       int64_t channel, float* out) {
  Lanes sum[kHeads][kCols] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    Lanes row[kCols];
    for (int c = 0; c < kCols; ++c) row[c] = load(rows[r] + channel + c * kLanes);
    for (int h = 0; h < kHeads; ++h) {
      const float weight = p[h * p_stride + r];
      for (int c = 0; c < kCols; ++c) sum[h][c] += row[c] * weight;
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int c = 0; c < kCols; ++c) store(out + h * dim + channel + c * kLanes, sum[h][c]);
}

template <int kHeads>
void value_heads(const float* p, int64_t p_stride, int64_t dim, const float* const* rows, int64_t num_rows,
                 float* out) {
  int64_t i = 0;
  constexpr int kCols = kLanes == 8 && kHeads >= 4 ? 3 : 4;
  for (; i + kCols * kLanes <= dim; i += kCols * kLanes)
    value_tile<kHeads, kCols>(p, p_stride, dim, rows, num_rows, i, out);
  for (; i + kLanes <= dim; i += kLanes) value_tile<kHeads, 1>(p, p_stride, dim, rows, num_rows, i, out);
  for (; i < dim; ++i)
    for (int h = 0; h < kHeads; ++h) {
      float sum = 0;
      for (int64_t r = 0; r < num_rows; ++r) sum += p[h * p_stride + r] * rows[r][i];
      out[h * dim + i] = sum;
    }
}

void attend_values(const float* p, int64_t p_stride, int num_heads, int64_t dim, const float* const* rows,
                   int64_t num_rows, float* out) {
  int h = 0;
  for (; h + 4 <= num_heads; h += 4) value_heads<4>(p + h * p_stride, p_stride, dim, rows, num_rows, out + h * dim);
  for (; h + 2 <= num_heads; h += 2) value_heads<2>(p + h * p_stride, p_stride, dim, rows, num_rows, out + h * dim);
  for (; h < num_heads; ++h) value_heads<1>(p + h * p_stride, p_stride, dim, rows, num_rows, out + h * dim);
}

float exp_sum(float* x, int64_t n, float max) {
  Lanes sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Lanes e = exp_lanes(load(x + i) - max);
    store(x + i, e);
    sum += e;
  }
  float total = fold_sum(sum);
  if (i < n) {
    float tail[kLanes];
    for (int j = 0; j < kLanes; ++j) tail[j] = i + j < n ? x[i + j] : -std::numeric_limits<float>::infinity();
    const Lanes e = exp_lanes(load(tail) - max);
    store(tail, e);
    for (int j = 0; i + j < n; ++j) {
      x[i + j] = tail[j];
      total += tail[j];
    }
  }
  return total;
}

inline void pool_lanes(const float* const* value, const float* const* gate, int num_slots, int64_t c, float* out) {
  Lanes max = splat(-std::numeric_limits<float>::infinity());
  for (int s = 0; s < num_slots; ++s) max = maximum(load(gate[s] + c), max);
  Lanes sum{}, weighted{};
  for (int s = 0; s < num_slots; ++s) {
    const Lanes e = exp_lanes(load(gate[s] + c) - max);
    sum += e;
    weighted += e * load(value[s] + c);
  }
  store(out, weighted / sum);
}

void softmax_pool(const float* const* value, const float* const* gate, int num_slots, int64_t n, float* out) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) pool_lanes(value, gate, num_slots, c, out + c);
  if (c < n && n >= kLanes) {  // overlapping last block: channels are independent
    float tail[kLanes];
    pool_lanes(value, gate, num_slots, n - kLanes, tail);
    std::memcpy(out + n - kLanes, tail, sizeof(tail));
  } else {
    for (; c < n; ++c) {
      float max = -std::numeric_limits<float>::infinity();
      for (int s = 0; s < num_slots; ++s) max = gate[s][c] > max ? gate[s][c] : max;
      float sum = 0, weighted = 0;
      for (int s = 0; s < num_slots; ++s) {
        const float e = exp_lanes(splat(gate[s][c] - max))[0];
        sum += e;
        weighted += e * value[s][c];
      }
      out[c] = weighted / sum;
    }
  }
}

void relu_scores(const float* q, const float* weight, int num_heads, const float* keys, int64_t num_keys, int64_t dim,
                 float* out) {
  constexpr int64_t kBlock = 8 * kTileRows;
  for (int64_t start = 0; start < num_keys; start += kBlock) {
    const int64_t count = num_keys - start < kBlock ? num_keys - start : kBlock;
    const float* rows[kBlock];
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = keys + (start + j) * dim;
      out[start + j] = 0;
    }
    for (int first = 0; first < num_heads; first += 4) {
      const int heads = num_heads - first < 4 ? num_heads - first : 4;
      float products[4 * kBlock];
      attend_scores(q + first * dim, heads, dim, rows, count, 1.0f, products, kBlock);
      for (int h = 0; h < heads; ++h)
        for (int64_t j = 0; j < count; ++j) {
          const float product = products[h * kBlock + j];
          out[start + j] += weight[first + h] * (product > 0 ? product : 0.0f);
        }
    }
  }
}

void decode_bf16(const uint16_t* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const HalfLanes half = *reinterpret_cast<const HalfLanes*>(x + i);
    store(y + i, (Lanes)(__builtin_convertvector(half, UintLanes) << 16));
  }
  for (; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(y + i, &bits, 4);
  }
}

inline UintLanes round_bits(UintLanes u) {
  const UintLanes rounded = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  const UintLanes quiet = (u | 0x00400000u) & 0xffff0000u;
  return (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

void encode_bf16(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    *reinterpret_cast<HalfLanes*>(y + i) = __builtin_convertvector(round_bits((UintLanes)load(x + i)) >> 16, HalfLanes);
  for (; i < n; ++i) {
    float block[kLanes] = {x[i]};
    y[i] = static_cast<uint16_t>(round_bits((UintLanes)load(block))[0] >> 16);
  }
}

void round_bf16(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, (Lanes)round_bits((UintLanes)load(x + i)));
  for (; i < n; ++i) {
    float block[kLanes] = {x[i]};
    store(block, (Lanes)round_bits((UintLanes)load(block)));
    x[i] = block[0];
  }
}

}  // namespace

extern const VecKernels kTable{sum_squares,  scale,       combine,     attend_scores, attend_values, exp_sum,
                               softmax_pool, relu_scores, decode_bf16, encode_bf16,   round_bf16};

}  // namespace dsv4::DSV4_VEC_NAMESPACE
