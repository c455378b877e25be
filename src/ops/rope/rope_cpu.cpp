// Frequency tables with YaRN, angles, rotation.
#include "ops/rope/rope.h"

#include <algorithm>
#include <cmath>

namespace dsv4 {

RopeFreqs make_rope_freqs(int rope_dim, double theta, const YarnParams* yarn) {
  const int num_pairs = rope_dim / 2;
  RopeFreqs result;
  result.freqs.resize(num_pairs);
  for (int i = 0; i < num_pairs; ++i)
    result.freqs[i] =
        1.0f / std::pow(static_cast<float>(theta), static_cast<float>(2 * i) / static_cast<float>(rope_dim));
  if (yarn == nullptr) return result;

  // The pair whose wavelength makes `rotations` turns over the original context.
  const auto correction = [&](double rotations) {
    return rope_dim * std::log(yarn->original_max_position / (rotations * 2 * M_PI)) / (2 * std::log(theta));
  };
  const double low = std::max(std::floor(correction(yarn->beta_fast)), 0.0);
  double high = std::min(std::ceil(correction(yarn->beta_slow)), static_cast<double>(rope_dim - 1));
  if (high == low) high += 0.001;
  for (int i = 0; i < num_pairs; ++i) {
    const float ramp = static_cast<float>(std::clamp((i - low) / (high - low), 0.0, 1.0));
    const float f = result.freqs[i];
    result.freqs[i] = f / static_cast<float>(yarn->factor) * ramp + f * (1.0f - ramp);
  }
  return result;
}

void rope_angles(const RopeFreqs& freqs, int64_t position, float* cos, float* sin) {
  for (size_t i = 0; i < freqs.freqs.size(); ++i) {
    const float angle = static_cast<float>(position) * freqs.freqs[i];
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
}

void rope_rotate(float* x, const float* cos, const float* sin, int num_pairs, RopeDirection direction) {
  const float sign = direction == RopeDirection::kForward ? 1.0f : -1.0f;
  for (int i = 0; i < num_pairs; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1], s = sign * sin[i];
    x[2 * i] = even * cos[i] - odd * s;
    x[2 * i + 1] = even * s + odd * cos[i];
  }
}

}  // namespace dsv4
