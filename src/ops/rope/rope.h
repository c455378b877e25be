// RoPE: rotation of the LAST rope_dim channels of a vector, interleaved pairs (2i, 2i+1). Spec 3.3.
//
// Forward: e' = e cos a - o sin a, o' = e sin a + o cos a with a = position * freq_i, the product in binary32 as the model's
// table. Inverse: -a. cos and sin are not scaled (no YaRN attention factor).
// Checks nothing: pointers and an even rope_dim are the caller's.
#pragma once

#include <cstdint>
#include <vector>

namespace dsv4 {

struct YarnParams {
  double factor;
  double original_max_position;
  double beta_fast;
  double beta_slow;
};

struct RopeFreqs {
  std::vector<float> freqs;  // [rope_dim / 2]
};

// yarn == nullptr: plain theta^(-2i/rope_dim).
RopeFreqs make_rope_freqs(int rope_dim, double theta, const YarnParams* yarn);

// cos, sin: [rope_dim / 2]
void rope_angles(const RopeFreqs& freqs, int64_t position, float* cos, float* sin);

enum class RopeDirection { kForward, kInverse };

// x: [2 * num_pairs] in place
void rope_rotate(float* x, const float* cos, const float* sin, int num_pairs, RopeDirection direction);

}  // namespace dsv4
