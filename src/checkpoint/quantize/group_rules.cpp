// Group encoders. Everything works on magnitudes: the rules are symmetric, the sign is put back when packing.
#include "checkpoint/quantize/group_rules.h"

#include <algorithm>

namespace dsv4 {
namespace {

constexpr int kGroup = kNvfp4GroupSize;

// mse looks at this many ue4m3 codes below and above the rule's (8 codes are a factor of two).
constexpr int kMseCodesBelow = 4;
constexpr int kMseCodesAbove = 8;

// A candidate must beat the rule by more than the rounding of the binary32 error sums, so that it is never really worse.
constexpr float kClearlyBetter = 1.0f - 8e-6f;

struct Group {
  float magnitude[kGroup];
  float amax;
};

inline void load_group(const float* w, Group& group) {
  for (int i = 0; i < kGroup; ++i) group.magnitude[i] = absolute(w[i]);
  float m[kGroup];
  for (int i = 0; i < kGroup; ++i) m[i] = group.magnitude[i];
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) m[i] = m[i] > m[i + half] ? m[i] : m[i + half];
  group.amax = m[0];
}

// The magnitude code of encode_e2m1 (thresholds of codec/e2m1.h), as a sum of comparisons.
inline int32_t magnitude_code(float x) {
  return static_cast<int32_t>(x > 0.25f) + static_cast<int32_t>(x >= 0.75f) + static_cast<int32_t>(x > 1.25f) +
         static_cast<int32_t>(x >= 1.75f) + static_cast<int32_t>(x > 2.5f) + static_cast<int32_t>(x >= 3.5f) +
         static_cast<int32_t>(x > 5.0f);
}

// 0 .5 1 1.5 2 3 4 6 without a table: the largest of three lines through the codes.
inline float magnitude_value(int32_t code) {
  const float m = static_cast<float>(code);
  const float a = 2.0f * m - 4.0f;
  const float b = 4.0f * m - 16.0f;
  const float ab = a > b ? a : b;
  return 0.5f * (m > ab ? m : ab);
}

inline float sum16(float* x) {
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// The global scale with a power of two near its reciprocal: squares are taken in that unit, so that they neither overflow
// nor vanish in binary32, whatever the size of the weights.
struct Scaling {
  float global;
  float unit;

  explicit Scaling(GlobalScale scale) : global(scale.value) {
    const int exponent = static_cast<int>(detail::float_bits(scale.value) >> 23) - 127;
    unit = detail::bits_float(static_cast<uint32_t>(std::clamp(-exponent, -126, 126) + 127) << 23);
  }
};

// Codes of a group under one sf; returns the squared error. w' = (e2m1 * sf) * global as decoders compute it.
inline float encode_magnitudes(const Group& group, uint8_t sf, const Scaling& scaling, int32_t* codes) {
  const float scale = decode_ue4m3(sf);
  const float global = scaling.global;
  const float divisor = scale * global;
  float error[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const int32_t code = magnitude_code(group.magnitude[i] / divisor);
    const float difference = (group.magnitude[i] - (magnitude_value(code) * scale) * global) * scaling.unit;
    codes[i] = code;
    error[i] = difference * difference;
  }
  return sum16(error);
}

// Tries another sf; keeps it if it is better than the best so far and clearly better than the rule's.
struct Search {
  const Group& group;
  const Scaling& scaling;
  float limit;      // candidates must be below
  uint8_t best_sf;
  float best_error;
  int32_t* best_codes;

  void attempt(uint8_t sf) {
    int32_t codes[kGroup];
    const float error = encode_magnitudes(group, sf, scaling, codes);
    if (!(error < limit) || !(error < best_error)) return;
    best_error = error;
    best_sf = sf;
    for (int i = 0; i < kGroup; ++i) best_codes[i] = codes[i];
  }
};

template <ScaleRule kRule>
GroupLoss encode_groups_with(const float* w, int64_t num_groups, GlobalScale global, uint8_t* codes, uint8_t* sf) {
  const Scaling scaling(global);
  GroupLoss loss;
  for (int64_t g = 0; g < num_groups; ++g, w += kGroup, codes += kGroup / 2) {
    Group group;
    load_group(w, group);
    const uint8_t rule_sf = nvfp4_weight_sf(group.amax, global);
    sf[g] = rule_sf;
    if (group.amax == 0.0f) {
      std::fill_n(codes, kGroup / 2, uint8_t{0});
      continue;
    }
    int32_t best[kGroup];
    const float rule_error = encode_magnitudes(group, rule_sf, scaling, best);
    float error = rule_error;
    if constexpr (kRule != ScaleRule::kModelOpt) {
      Search search{group, scaling, rule_error * kClearlyBetter, rule_sf, rule_error, best};
      if constexpr (kRule == ScaleRule::kMse) {
        const int first = std::max(1, rule_sf - kMseCodesBelow);
        const int last = std::min(0x7e, rule_sf + kMseCodesAbove);
        for (int code = first; code <= last; ++code)
          if (code != rule_sf) search.attempt(static_cast<uint8_t>(code));
      } else {
        const float on_four = group.amax / (4.0f * global.value);
        if (on_four <= kE4m3Max) search.attempt(encode_ue4m3(std::max(on_four, kE4m3MinSubnormal)));
      }
      sf[g] = search.best_sf;
      error = search.best_error;
    }

    float square[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const float in_unit = group.magnitude[i] * scaling.unit;
      square[i] = in_unit * in_unit;
    }
    int32_t nibble[kGroup];
    int32_t any = 0;
    for (int i = 0; i < kGroup; ++i) any |= best[i];
    // The sign bit of w, but 0 for w == -0 (codec/nvfp4.h).
    for (int i = 0; i < kGroup; ++i) nibble[i] = best[i] | (static_cast<int32_t>(w[i] < 0.0f) << 3);
    for (int j = 0; j < kGroup / 2; ++j) codes[j] = static_cast<uint8_t>(nibble[2 * j] | (nibble[2 * j + 1] << 4));
    loss.error_sq += error;
    loss.norm_sq += sum16(square);
    loss.num_zeroed += any == 0;
    // Above 7 the largest element is more than half a step outside a grid that went on with 8.
    loss.num_saturated += group.amax > 7.0f * (decode_ue4m3(sf[g]) * global.value);
  }
  const double unit_sq = static_cast<double>(scaling.unit) * scaling.unit;
  loss.error_sq /= unit_sq;
  loss.norm_sq /= unit_sq;
  return loss;
}

}  // namespace

void AmaxRange::add(const AmaxRange& other) {
  largest = std::max(largest, other.largest);
  if (other.smallest_group != 0.0f && (smallest_group == 0.0f || other.smallest_group < smallest_group))
    smallest_group = other.smallest_group;
}

AmaxRange group_amax_range(const float* w, int64_t num_groups) {
  AmaxRange range;
  for (int64_t g = 0; g < num_groups; ++g) {
    Group group;
    load_group(w + g * kGroup, group);
    range.add({group.amax, group.amax});
  }
  return range;
}

GlobalScale rule_global_scale(const AmaxRange& range, ScaleRule rule) {
  const GlobalScale global = nvfp4_global_scale(range.largest);
  if (rule == ScaleRule::kModelOpt || range.largest == 0.0f) return global;
  // Twice the smallest normal code: halving it is exact.
  const bool room = range.smallest_group / (6.0f * global.value) >= 0x1p-5f;
  return {room ? 2.0f * global.value : global.value};
}

GroupLoss encode_groups(const float* w, int64_t num_groups, GlobalScale global, ScaleRule rule, uint8_t* codes,
                        uint8_t* sf) {
  switch (rule) {
    case ScaleRule::kModelOpt: return encode_groups_with<ScaleRule::kModelOpt>(w, num_groups, global, codes, sf);
    case ScaleRule::kMse: return encode_groups_with<ScaleRule::kMse>(w, num_groups, global, codes, sf);
    case ScaleRule::kFourOverSix: return encode_groups_with<ScaleRule::kFourOverSix>(w, num_groups, global, codes, sf);
  }
  return {};
}

}  // namespace dsv4
