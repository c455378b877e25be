// NVFP4: e2m1 elements, one ue4m3 scale factor (sf) per 16 consecutive elements along K, one binary32 global scale.
//
//   x ~ e2m1 * sf * global        two elements a byte, element 2j in the LOW nibble; sf in [row, K/16] order ("linear")
//
// Decoding MULTIPLIES by GlobalScale (ModelOpt weight_scale_2). GlobalScaleRcp is its reciprocal (compressed-tensors
// weight_global_scale) and exists only to be converted. Order of decoding: e2m1 * sf is exact (at most 6 significant
// bits, so also in BF16 and FP16); then one rounded multiplication by global; then one rounding to the output type.
//
// Two encoding rules, both binary32, each operation rounded once, no fused multiply-add:
//   weight rule    (ModelOpt export)  sf = e4m3(max(amax16 / (6 g), 2^-9)), all-zero group: 1;  q = e2m1(w / (sf g)),
//                                     but code 0 for w == -0 (a small negative that rounds to zero keeps its sign)
//   run-time rule  (activations, KV)  sf = e4m3(amax16 * (1/(6 g))), may be 0;                  q = e2m1(x * (1/(sf g)))
// Compile with -ffp-contract=off (nvcc: --fmad=false): a contraction changes bytes.
//
// NaN and infinity are no input of the weight rule: whoever quantises a tensor refuses them first (checkpoint/quantize).
// The run-time rule is total. NaN: ignored by amax, encoded as +6. Infinity: sf = 448 under a finite global, so the element
// becomes the largest code; under a global taken from the infinite row itself sf is NaN and the row decodes to NaN.
#pragma once

#include <cstdint>

#include "codec/e2m1.h"
#include "codec/e4m3.h"

namespace dsv4 {

constexpr int kNvfp4GroupSize = 16;
constexpr float kNvfp4MaxProduct = 2688.0f;  // 6 * 448

struct GlobalScale {
  float value;  // multiplies when decoding
};
struct GlobalScaleRcp {
  float value;  // 1 / GlobalScale
};
DSV4_HD constexpr GlobalScaleRcp rcp(GlobalScale scale) { return {1.0f / scale.value}; }
DSV4_HD constexpr GlobalScale rcp(GlobalScaleRcp scale) { return {1.0f / scale.value}; }

// One group as stored: 8 bytes of codes and its scale factor.
struct Nvfp4Group {
  uint8_t codes[kNvfp4GroupSize / 2];
  uint8_t sf;
};

// amax over a tensor (weights) or a row (activations) -> global scale; 1 when everything is zero.
DSV4_HD constexpr GlobalScale nvfp4_global_scale(float amax) { return {amax == 0.0f ? 1.0f : amax / kNvfp4MaxProduct}; }

DSV4_HD constexpr float absolute(float x) { return detail::bits_float(detail::float_bits(x) & 0x7fffffffu); }

// NaN elements are ignored, as IEEE maxNum does.
DSV4_HD constexpr float group_amax(const float* x, int count) {
  float amax = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float a = absolute(x[i]);
    if (a > amax) amax = a;
  }
  return amax;
}

// ---- weight rule ----

DSV4_HD constexpr uint8_t nvfp4_weight_sf(float amax16, GlobalScale global) {
  if (amax16 == 0.0f) return 0x38;  // 1.0
  const float sf = amax16 / (6.0f * global.value);
  return encode_ue4m3(sf < kE4m3MinSubnormal ? kE4m3MinSubnormal : sf);
}

// divisor = sf * global, rounded.
DSV4_HD constexpr uint8_t encode_nvfp4_weight_element(float w, float divisor) {
  return w == 0.0f ? 0 : encode_e2m1(w / divisor);
}

DSV4_HD constexpr Nvfp4Group encode_nvfp4_weight_group(const float* w, GlobalScale global) {
  Nvfp4Group group{};
  group.sf = nvfp4_weight_sf(group_amax(w, kNvfp4GroupSize), global);
  const float divisor = decode_ue4m3(group.sf) * global.value;
  for (int j = 0; j < kNvfp4GroupSize / 2; ++j)
    group.codes[j] =
        pack_e2m1x2(encode_nvfp4_weight_element(w[2 * j], divisor), encode_nvfp4_weight_element(w[2 * j + 1], divisor));
  return group;
}

// ---- run-time rule ----

// Reciprocal of 6 g: once per call or per row, then passed to every group.
DSV4_HD constexpr float nvfp4_rcp6(GlobalScale global) { return 1.0f / (6.0f * global.value); }

DSV4_HD constexpr uint8_t nvfp4_runtime_sf(float amax16, float rcp6) { return encode_ue4m3(amax16 * rcp6); }

// What x is multiplied by before encode_e2m1; 0 when sf is 0.
DSV4_HD constexpr float nvfp4_runtime_multiplier(uint8_t sf, GlobalScale global) {
  return sf == 0 ? 0.0f : 1.0f / (decode_ue4m3(sf) * global.value);
}

DSV4_HD constexpr Nvfp4Group encode_nvfp4_runtime_group(const float* x, GlobalScale global, float rcp6) {
  Nvfp4Group group{};
  group.sf = nvfp4_runtime_sf(group_amax(x, kNvfp4GroupSize), rcp6);
  const float multiplier = nvfp4_runtime_multiplier(group.sf, global);
  for (int j = 0; j < kNvfp4GroupSize / 2; ++j)
    group.codes[j] = pack_e2m1x2(encode_e2m1(x[2 * j] * multiplier), encode_e2m1(x[2 * j + 1] * multiplier));
  return group;
}

// ---- decoding ----

DSV4_HD constexpr float decode_nvfp4(uint8_t code, uint8_t sf, GlobalScale global) {
  return (decode_e2m1(code) * decode_ue4m3(sf)) * global.value;
}

// out: [16]
DSV4_HD constexpr void decode_nvfp4_group(const uint8_t* codes, uint8_t sf, GlobalScale global, float* out) {
  for (int j = 0; j < kNvfp4GroupSize / 2; ++j) {
    out[2 * j] = decode_nvfp4(e2m1x2_even(codes[j]), sf, global);
    out[2 * j + 1] = decode_nvfp4(e2m1x2_odd(codes[j]), sf, global);
  }
}

}  // namespace dsv4
