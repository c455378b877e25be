// Hyper-connections on the CPU, one token after the other.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "ops/gemm/gemm.h"
#include "ops/hyper_connection/hyper_connection.h"
#include "ops/norm/norm.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void sinkhorn(float* c, int n, int iters, float eps) {
  for (int j = 0; j < n; ++j) {
    float* row = c + j * n;
    float max = row[0];
    for (int k = 1; k < n; ++k) max = std::fmax(max, row[k]);
    float sum = 0;
    for (int k = 0; k < n; ++k) sum += row[k] = std::exp(row[k] - max);
    for (int k = 0; k < n; ++k) row[k] = row[k] / sum + eps;
  }
  const auto divide_columns = [&] {
    for (int k = 0; k < n; ++k) {
      float sum = eps;
      for (int j = 0; j < n; ++j) sum += c[j * n + k];
      for (int j = 0; j < n; ++j) c[j * n + k] /= sum;
    }
  };
  divide_columns();
  for (int iter = 1; iter < iters; ++iter) {
    for (int j = 0; j < n; ++j) {
      float sum = eps;
      for (int k = 0; k < n; ++k) sum += c[j * n + k];
      for (int k = 0; k < n; ++k) c[j * n + k] /= sum;
    }
    divide_columns();
  }
}

void weighted_streams(const float* streams, const float* weight, const HcShape& shape, const VecKernels& vec,
                      float* y) {
  const float* terms[kMaxHcStreams];
  for (int j = 0; j < shape.num_hc; ++j) terms[j] = streams + j * shape.hidden;
  vec.combine(terms, weight, shape.num_hc, shape.hidden, y);
  if (shape.round_output) vec.round_bf16(y, shape.hidden);
}

// [num_tokens, num_rows] = rms factor of each token * (fn f). All tokens in one GEMM: fn (1.5 MB at hidden 4096) is read once
// per step instead of once per token.
float* mix_streams(const HcShape& shape, const HcParams& params, int num_rows, const float* streams,
                   const CpuContext& context) {
  static thread_local std::vector<float> mix;  // of the calling thread; workers get a pointer
  mix.resize(static_cast<size_t>(shape.num_tokens * num_rows));
  float* m = mix.data();
  const int64_t width = shape.num_hc * shape.hidden;
  const Weight fn{{WeightFormat::kF32, num_rows, width, params.fn}, nullptr};
  gemm({streams, &fn, m, shape.num_tokens, width, num_rows, /*round_output=*/false}, context);
  for_rows(context, shape.num_tokens, width, [&](int64_t token) {
    const float r = rms_factor(streams + token * width, width, shape.rms_eps, context.isa);
    for (int i = 0; i < num_rows; ++i) m[token * num_rows + i] *= r;
  });
  return m;
}

}  // namespace

void hc_split(const float* m, const HcParams& params, const HcShape& shape, float* pre, float* post, float* comb) {
  const int n = shape.num_hc;
  for (int j = 0; j < n; ++j) {
    pre[j] = sigmoid(m[j] * params.scale[0] + params.base[j]) + shape.hc_eps;
    post[j] = 2.0f * sigmoid(m[n + j] * params.scale[1] + params.base[n + j]);
  }
  for (int i = 0; i < n * n; ++i) comb[i] = m[2 * n + i] * params.scale[2] + params.base[2 * n + i];
  sinkhorn(comb, n, shape.sinkhorn_iters, shape.hc_eps);
}

void hc_pre(const HcShape& shape, const HcParams& params, const float* streams, float* y, float* post, float* comb,
            const CpuContext& context) {
  DSV4_CHECK(shape.num_hc >= 1 && shape.num_hc <= kMaxHcStreams, "num_hc = {}", shape.num_hc);
  const VecKernels& vec = vec_kernels(context.isa);
  const int n = shape.num_hc, num_mix = (2 + n) * n;
  const int64_t width = n * shape.hidden;
  const float* mix = mix_streams(shape, params, num_mix, streams, context);
  for_rows(context, shape.num_tokens, 2 * width + 4096, [&](int64_t token) {
    float pre[kMaxHcStreams];
    hc_split(mix + token * num_mix, params, shape, pre, post + token * n, comb + token * n * n);
    weighted_streams(streams + token * width, pre, shape, vec, y + token * shape.hidden);
  });
}

void hc_post(const HcShape& shape, const float* sublayer_out, const float* post, const float* comb, float* streams,
             const CpuContext& context) {
  const VecKernels& vec = vec_kernels(context.isa);
  const int n = shape.num_hc;
  // Channels go in blocks that fit a local copy: every new stream needs all old ones.
  constexpr int64_t kBlock = 512;
  for_rows(context, shape.num_tokens, shape.hidden * n * (n + 1), [&](int64_t token) {
    float* x = streams + token * n * shape.hidden;
    const float* c = comb + token * n * n;
    float old[kMaxHcStreams][kBlock];
    for (int64_t start = 0; start < shape.hidden; start += kBlock) {
      const int64_t count = std::min(kBlock, shape.hidden - start);
      const float* terms[kMaxHcStreams + 1];
      for (int j = 0; j < n; ++j) {
        std::copy_n(x + j * shape.hidden + start, count, old[j]);
        terms[j + 1] = old[j];
      }
      terms[0] = sublayer_out + token * shape.hidden + start;
      for (int k = 0; k < n; ++k) {
        float coeff[kMaxHcStreams + 1] = {post[token * n + k]};
        for (int j = 0; j < n; ++j) coeff[j + 1] = c[j * n + k];
        float* out = x + k * shape.hidden + start;
        vec.combine(terms, coeff, n + 1, count, out);
        if (shape.round_output) vec.round_bf16(out, count);
      }
    }
  });
}

void hc_head(const HcShape& shape, const HcParams& params, const float* streams, float* y, const CpuContext& context) {
  DSV4_CHECK(shape.num_hc >= 1 && shape.num_hc <= kMaxHcStreams, "num_hc = {}", shape.num_hc);
  const VecKernels& vec = vec_kernels(context.isa);
  const int n = shape.num_hc;
  const int64_t width = n * shape.hidden;
  const float* mix = mix_streams(shape, params, n, streams, context);
  for_rows(context, shape.num_tokens, 2 * width, [&](int64_t token) {
    float w[kMaxHcStreams];
    for (int k = 0; k < n; ++k) w[k] = sigmoid(mix[token * n + k] * params.scale[0] + params.base[k]) + shape.hc_eps;
    weighted_streams(streams + token * width, w, shape, vec, y + token * shape.hidden);
  });
}

}  // namespace dsv4
