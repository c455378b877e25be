// Peak arithmetic of AMX: full tiles, four independent sums.
#include <immintrin.h>
#include <time.h>

#include <cstdint>

namespace dsv4::bench {
double peak_bf16_amx();
double peak_int8_amx();

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Best of several passes of about 2 ms; zeros in the operands: the unit's speed does not depend on them.
template <class Step>
double measure_tiles(double ops_per_tile, Step step) {
  constexpr int kSteps = 100000;
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  asm volatile("tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7" ::);
  asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
  double best = 0.0;
  for (int pass = 0; pass < 8; ++pass) {
    timespec begin{}, end{};
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int n = 0; n < kSteps; ++n) step();
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds =
        static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
    const double rate = ops_per_tile * 4.0 * kSteps / seconds;
    best = rate > best ? rate : best;
  }
  asm volatile("tilerelease" ::: "memory");
  return best;
}

}  // namespace

double peak_bf16_amx() {
  return measure_tiles(2.0 * 16 * 16 * 32, [] {
    asm volatile(
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
  });
}

double peak_int8_amx() {
  return measure_tiles(2.0 * 16 * 16 * 64, [] {
    asm volatile(
        "tdpbssd %%tmm6, %%tmm4, %%tmm0\n tdpbssd %%tmm7, %%tmm4, %%tmm1\n"
        "tdpbssd %%tmm6, %%tmm5, %%tmm2\n tdpbssd %%tmm7, %%tmm5, %%tmm3" ::);
  });
}

}  // namespace dsv4::bench
