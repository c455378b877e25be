// Slow, obviously right rounding for the codec tests: nearest entry of a value table, ties to the even code, saturating.
//
// Distances are taken in binary64: below the largest value (448) the difference of a binary32 number and a table entry is
// exact, or the number is so small that its rounding cannot matter.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/threads.h"

namespace dsv4::test {

// Code c of a magnitude stands for values[c], rising.
inline uint8_t nearest_code(const std::vector<double>& values, double magnitude) {
  if (magnitude >= values.back()) return static_cast<uint8_t>(values.size() - 1);
  size_t best = 0;
  for (size_t code = 1; code < values.size(); ++code) {
    const double distance = std::fabs(values[code] - magnitude);
    const double best_distance = std::fabs(values[best] - magnitude);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best);
}

inline std::vector<double> e2m1_values() { return {0, 0.5, 1, 1.5, 2, 3, 4, 6}; }

// mmm / 8 * 2^-6 below exponent 1, 2^(eeee-7) * (1 + mmm/8) from there; without NaN.
inline std::vector<double> e4m3_values() {
  std::vector<double> values;
  for (int code = 0; code < 0x7f; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    values.push_back(exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10));
  }
  return values;
}

// For each code the first bit pattern of a positive binary32 that rounds to it (rounding to nearest is monotone, so the
// inputs of a code are a run); one past the last code: the first NaN.
inline std::vector<uint32_t> run_starts(const std::vector<double>& values) {
  std::vector<uint32_t> starts{0};
  for (size_t code = 1; code < values.size(); ++code) {
    uint32_t low = starts.back(), high = 0x7f800000u;  // low rounds below code, infinity does not
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (nearest_code(values, std::bit_cast<float>(middle)) >= code ? high : low) = middle;
    }
    starts.push_back(high);
  }
  starts.push_back(0x7f800001u);
  return starts;
}

// Number of binary32 inputs (of all 2^32) for which encode differs from the oracle. Under a sanitizer, which makes this
// fifty times slower, only every 61st input and all within 1000 of a run's ends are tried.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint32_t kInputStride = 61;
#else
constexpr uint32_t kInputStride = 1;
#endif

template <class Encode>
int64_t count_mismatches(const std::vector<double>& values, uint8_t sign_bit, uint8_t nan_code, const Encode& encode) {
  struct Run {
    uint32_t begin, end;  // bit patterns, end not included
    uint8_t code;
    uint32_t stride;
  };
  constexpr uint32_t kBlock = 1u << 22;
  constexpr uint32_t kEdge = 1000;
  std::vector<Run> runs;
  const auto add = [&](uint32_t begin, uint64_t end, uint8_t code) {
    for (uint64_t at = begin; at < end; at += kBlock)
      runs.push_back(
          {static_cast<uint32_t>(at), static_cast<uint32_t>(std::min<uint64_t>(end, at + kBlock)), code, kInputStride});
    if (kInputStride == 1) return;
    runs.push_back({begin, static_cast<uint32_t>(std::min<uint64_t>(end, uint64_t{begin} + kEdge)), code, 1});
    runs.push_back({static_cast<uint32_t>(std::max<uint64_t>(begin, end < kEdge ? 0 : end - kEdge)),
                    static_cast<uint32_t>(end), code, 1});
  };
  const std::vector<uint32_t> starts = run_starts(values);
  for (size_t code = 0; code < values.size(); ++code) add(starts[code], starts[code + 1], static_cast<uint8_t>(code));
  const size_t num_finite = runs.size();
  add(0x7f800001u, 0x80000000u, nan_code);

  ThreadPool pool;
  std::vector<int64_t> wrong(runs.size());
  pool.parallel_for(static_cast<int64_t>(runs.size()), [&](int64_t index) {
    const Run& run = runs[static_cast<size_t>(index)];
    const bool is_nan = static_cast<size_t>(index) >= num_finite;
    const auto negative_code = static_cast<uint8_t>(is_nan ? nan_code : run.code | sign_bit);
    int64_t count = 0;
    for (uint64_t bits = run.begin; bits < run.end; bits += run.stride) {
      const auto positive = static_cast<uint32_t>(bits);
      count += encode(std::bit_cast<float>(positive)) != run.code;
      count += encode(std::bit_cast<float>(positive | 0x80000000u)) != negative_code;
    }
    wrong[static_cast<size_t>(index)] = count;
  });
  int64_t total = 0;
  for (int64_t count : wrong) total += count;
  return total;
}

}  // namespace dsv4::test
