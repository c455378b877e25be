// The inner loops of the synthetic checkpoint: plain C++ without branches, compiled for more than one instruction set. Bytes
// are the same on every one (no fused operations, no reassociation).
#pragma once

#include <cstdint>

#include "codec/nvfp4.h"

namespace dsv4 {

// Bijective mixing of 64 bits (splitmix64's output function).
constexpr uint64_t synth_mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
constexpr uint64_t kSynthGolden = 0x9e3779b97f4a7c15ull;

// out[i] = mean + deviation * normal(mix(key + (first + i) * golden)), rounded to bf16 if asked.
void synth_normals(uint64_t key, uint64_t first, int64_t count, float mean, float deviation, bool round, float* out);

// max |x|; no NaN among them.
float synth_amax(const float* x, int64_t count);

// One row under the weight rule of codec/nvfp4.h: codes [cols / 2], sf [cols / 16]. Finite values.
void synth_nvfp4_row(const float* x, int64_t cols, GlobalScale global, uint8_t* codes, uint8_t* sf);

// Finite values.
void synth_encode_bf16(const float* x, int64_t count, uint16_t* out);
void synth_decode_bf16(const uint16_t* x, int64_t count, float* out);

}  // namespace dsv4
