// Group encoders. Everything works on magnitudes: the rules are symmetric, the sign is put back when packing.
#include "checkpoint/quantize/group_rules.h"

#include <algorithm>
#include <cstring>

namespace dsv4 {
namespace {

constexpr int kGroup = kNvfp4GroupSize;

// mse looks at this many ue4m3 codes below and above the rule's (8 codes are a factor of two).
constexpr int kMseCodesBelow = 4;
constexpr int kMseCodesAbove = 8;

// A candidate must beat the rule by more than the rounding of the binary32 error sums, so that it is never really worse.
constexpr float kClearlyBetter = 1.0f - 8e-6f;

// Four lanes, in the compilers' portable vector types: every x86-64 and AArch64 has them, and each lane rounds as a scalar
// operation would.
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint64_t U2 __attribute__((vector_size(16)));
constexpr int kVectors = kGroup / 4;

inline F4 all(float x) { return F4{x, x, x, x}; }
inline F4 max(F4 a, F4 b) { return a > b ? a : b; }
inline float sum(F4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

struct Group {
  F4 w[kVectors];
  F4 magnitude[kVectors];
  float amax;
};

inline Group load_group(const float* w) {
  Group group;
  std::memcpy(group.w, w, sizeof(group.w));
  for (int v = 0; v < kVectors; ++v)
    group.magnitude[v] = reinterpret_cast<F4>(reinterpret_cast<I4>(group.w[v]) & 0x7fffffff);
  const F4 m = max(max(group.magnitude[0], group.magnitude[1]), max(group.magnitude[2], group.magnitude[3]));
  group.amax = std::max(std::max(m[0], m[1]), std::max(m[2], m[3]));
  return group;
}

// The magnitude code of encode_e2m1 (thresholds of codec/e2m1.h): minus the sum of comparisons, each 0 or -1.
inline I4 magnitude_code(F4 x) {
  return -((x > all(0.25f)) + (x >= all(0.75f)) + (x > all(1.25f)) + (x >= all(1.75f)) + (x > all(2.5f)) +
           (x >= all(3.5f)) + (x > all(5.0f)));
}

// 0 .5 1 1.5 2 3 4 6 without a table: the largest of three lines through the codes.
inline F4 magnitude_value(I4 code) {
  const F4 half = __builtin_convertvector(code, F4) * all(0.5f);
  return max(half, max(half + half - all(2.0f), all(4.0f) * half - all(8.0f)));
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

struct Codes {
  I4 magnitude[kVectors];
};

// Codes of a group under one sf; returns the squared error. w' = (e2m1 * sf) * global as decoders compute it.
inline float encode_magnitudes(const Group& group, uint8_t sf, const Scaling& scaling, Codes& codes) {
  const float scale = decode_ue4m3(sf);
  const F4 divisor = all(scale * scaling.global);
  F4 error = all(0.0f);
  for (int v = 0; v < kVectors; ++v) {
    const F4 m = group.magnitude[v];
    const I4 code = magnitude_code(m / divisor);
    const F4 difference = (m - (magnitude_value(code) * all(scale)) * all(scaling.global)) * all(scaling.unit);
    codes.magnitude[v] = code;
    error += difference * difference;
  }
  return sum(error);
}

// Tries another sf; keeps it if it is better than the best so far and clearly better than the rule's.
struct Search {
  const Group& group;
  const Scaling& scaling;
  float limit;  // candidates must be below
  uint8_t best_sf;
  float best_error;
  Codes& best;

  void attempt(uint8_t sf) {
    Codes codes;
    const float error = encode_magnitudes(group, sf, scaling, codes);
    if (!(error < limit) || !(error < best_error)) return;
    best_error = error;
    best_sf = sf;
    best = codes;
  }
};

// Puts the sign of w back (0 for w == -0, codec/nvfp4.h) and packs; returns whether any code is not zero.
inline bool pack_group(const Group& group, const Codes& codes, uint8_t* out) {
  I4 any = {0, 0, 0, 0};
  for (int v = 0; v < kVectors; ++v) {
    any |= codes.magnitude[v];
    const I4 nibble = codes.magnitude[v] | ((group.w[v] < all(0.0f)) & 8);
    const U2 pair = reinterpret_cast<U2>(nibble);  // even element in the low half
    const U2 byte = pair | (pair >> 28);
    out[2 * v] = static_cast<uint8_t>(byte[0]);
    out[2 * v + 1] = static_cast<uint8_t>(byte[1]);
  }
  return (any[0] | any[1] | any[2] | any[3]) != 0;
}

template <ScaleRule kRule>
GroupLoss encode_groups_with(const float* w, int64_t num_groups, GlobalScale global, uint8_t* codes, uint8_t* sf) {
  const Scaling scaling(global);
  GroupLoss loss;
  for (int64_t g = 0; g < num_groups; ++g, w += kGroup, codes += kGroup / 2) {
    const Group group = load_group(w);
    const uint8_t rule_sf = nvfp4_weight_sf(group.amax, global);
    sf[g] = rule_sf;
    if (group.amax == 0.0f) {
      std::fill_n(codes, kGroup / 2, uint8_t{0});
      continue;
    }
    Codes best;
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

    F4 norm = all(0.0f);
    for (int v = 0; v < kVectors; ++v) {
      const F4 in_unit = group.magnitude[v] * all(scaling.unit);
      norm += in_unit * in_unit;
    }
    const bool any = pack_group(group, best, codes);
    loss.error_sq += error;
    loss.norm_sq += sum(norm);
    loss.num_zeroed += !any;
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
    const float amax = load_group(w + g * kGroup).amax;
    range.add({amax, amax});
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
    case ScaleRule::kModelOpt:
      return encode_groups_with<ScaleRule::kModelOpt>(w, num_groups, global, codes, sf);
    case ScaleRule::kMse:
      return encode_groups_with<ScaleRule::kMse>(w, num_groups, global, codes, sf);
    case ScaleRule::kFourOverSix:
      return encode_groups_with<ScaleRule::kFourOverSix>(w, num_groups, global, codes, sf);
  }
  return {};
}

}  // namespace dsv4
