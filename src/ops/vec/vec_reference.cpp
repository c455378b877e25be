// The plain loops that define the vector kernels, and the table by instruction set.
#include <algorithm>
#include <cmath>
#include <limits>

#include "codec/bf16.h"
#include "ops/vec/vec_tables.h"

namespace dsv4 {
namespace {

double dot_double(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

float dot(const float* a, const float* b, int64_t n) { return static_cast<float>(dot_double(a, b, n)); }

float sum_squares(const float* x, int64_t n) { return dot(x, x, n); }

void scale(const float* x, const float* weight, float factor, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = weight ? weight[i] * (x[i] * factor) : x[i] * factor;
}

void combine(const float* const* x, const float* coeff, int num_terms, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int j = 0; j < num_terms; ++j) sum += static_cast<double>(coeff[j]) * x[j][i];
    y[i] = static_cast<float>(sum);
  }
}

void attend_scores(const float* q, int num_heads, int64_t dim, const float* const* rows, int64_t num_rows, float scale,
                   float* scores, int64_t score_stride) {
  for (int h = 0; h < num_heads; ++h)
    for (int64_t r = 0; r < num_rows; ++r) scores[h * score_stride + r] = scale * dot(q + h * dim, rows[r], dim);
}

void attend_values(const float* p, int64_t p_stride, int num_heads, int64_t dim, const float* const* rows,
                   int64_t num_rows, float* out) {
  for (int h = 0; h < num_heads; ++h)
    for (int64_t i = 0; i < dim; ++i) {
      double sum = 0;
      for (int64_t r = 0; r < num_rows; ++r) sum += static_cast<double>(p[h * p_stride + r]) * rows[r][i];
      out[h * dim + i] = static_cast<float>(sum);
    }
}

float exp_sum(float* x, int64_t n, float max) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - max);
    sum += x[i];
  }
  return static_cast<float>(sum);
}

void softmax_pool(const float* const* value, const float* const* gate, int num_slots, int64_t n, float* out) {
  for (int64_t c = 0; c < n; ++c) {
    float max = -std::numeric_limits<float>::infinity();
    for (int s = 0; s < num_slots; ++s) max = std::max(max, gate[s][c]);
    double sum = 0, weighted = 0;
    for (int s = 0; s < num_slots; ++s) {
      const double e = std::exp(gate[s][c] - max);
      sum += e;
      weighted += e * value[s][c];
    }
    out[c] = static_cast<float>(weighted / sum);
  }
}

void relu_scores(const float* q, const float* weight, int num_heads, const float* keys, int64_t num_keys, int64_t dim,
                 float* out) {
  for (int64_t j = 0; j < num_keys; ++j) {
    double sum = 0;
    for (int h = 0; h < num_heads; ++h) sum += weight[h] * std::max(0.0, dot_double(q + h * dim, keys + j * dim, dim));
    out[j] = static_cast<float>(sum);
  }
}

void decode_bf16_array(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = decode_bf16({x[i]});
}

void encode_bf16_array(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = encode_bf16(x[i]).bits;
}

void round_bf16_array(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = round_bf16(x[i]);
}

constexpr VecKernels kReferenceTable{sum_squares,     scale,        combine,     attend_scores,     attend_values,
                                     exp_sum,         softmax_pool, relu_scores, decode_bf16_array, encode_bf16_array,
                                     round_bf16_array};

}  // namespace

const VecKernels& vec_kernels(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kReference:
      return kReferenceTable;
    case CpuIsa::kAvx2:
      return vec_avx2::kTable;
    case CpuIsa::kAvx512:
    case CpuIsa::kAmx:
      return vec_avx512::kTable;
  }
  return kReferenceTable;
}

}  // namespace dsv4
