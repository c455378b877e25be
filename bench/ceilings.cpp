// The machine's own ceilings: streaming read and copy, and peak arithmetic, one and all threads.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/check.h"
#include "bench/bench.h"

namespace dsv4::bench {
namespace {

constexpr int64_t kStreamBytes = 1024ll << 20;
constexpr int64_t kStreamChunk = 1 << 20;

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
using Area = std::unique_ptr<std::byte, Free>;

Area allocate(int64_t bytes) {
  void* p = std::aligned_alloc(2 << 20, static_cast<size_t>(bytes));
  if (p == nullptr) throw_resource("cannot allocate {} bytes for the stream test", bytes);
  ::madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return Area(static_cast<std::byte*>(p));
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best of several: a ceiling is what the machine can do, not what it did while others used it.
double best_rate(double amount, int reps, const std::function<void()>& pass) {
  pass();
  double best = 0.0;
  for (int i = 0; i < reps; ++i) {
    const double begin = now();
    pass();
    best = std::max(best, amount / (now() - begin));
  }
  return best;
}

typedef uint64_t Lanes __attribute__((vector_size(16)));

// Four independent streams of 16-byte loads; the result keeps the compiler from dropping them.
uint64_t read_chunk(const std::byte* data) {
  const Lanes* p = reinterpret_cast<const Lanes*>(data);
  Lanes a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < kStreamChunk / 16; i += 8) {
    __builtin_prefetch(p + i + 256);
    __builtin_prefetch(p + i + 260);
    a ^= p[i] ^ p[i + 4];
    b ^= p[i + 1] ^ p[i + 5];
    c ^= p[i + 2] ^ p[i + 6];
    d ^= p[i + 3] ^ p[i + 7];
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1];
}

double read_rate(ThreadPool& pool, const std::byte* data) {
  std::atomic<uint64_t> sink{0};
  return best_rate(static_cast<double>(kStreamBytes), 7, [&] {
    pool.parallel_for(kStreamBytes / kStreamChunk, [&](int64_t i) { sink ^= read_chunk(data + i * kStreamChunk); });
  });
}

double copy_rate(ThreadPool& pool, const std::byte* from, std::byte* to) {
  return best_rate(2.0 * static_cast<double>(kStreamBytes / 2), 5, [&] {
    pool.parallel_for(kStreamBytes / 2 / kStreamChunk,
                      [&](int64_t i) { std::memcpy(to + i * kStreamChunk, from + i * kStreamChunk, kStreamChunk); });
  });
}

double all_threads(ThreadPool& pool, double (*peak)()) {
  std::vector<double> rate(static_cast<size_t>(pool.num_threads()));
  pool.parallel_for(pool.num_threads(), [&](int64_t i) { rate[static_cast<size_t>(i)] = peak(); });
  double sum = 0.0;
  for (double r : rate) sum += std::max(0.0, r);
  return sum;
}

}  // namespace

Ceilings measure_ceilings(const CpuContext& context) {
  Ceilings c;
  const Area data = allocate(kStreamBytes);
  context.pool.parallel_for(kStreamBytes / kStreamChunk, [&](int64_t i) {
    std::memset(data.get() + i * kStreamChunk, static_cast<int>(i + 1), kStreamChunk);
  });
  ThreadPool one(1);
  c.read_one = read_rate(one, data.get());
  c.read_all = read_rate(context.pool, data.get());
  c.copy_one = copy_rate(one, data.get(), data.get() + kStreamBytes / 2);
  c.copy_all = copy_rate(context.pool, data.get(), data.get() + kStreamBytes / 2);
  if (context.isa >= CpuIsa::kAvx512) {
    c.f32_flops = all_threads(context.pool, peak_f32_avx512);
    c.int8_dot_ops = all_threads(context.pool, peak_int8_avx512);
    c.bf16_dot_flops = all_threads(context.pool, peak_bf16_avx512);
    if (context.isa == CpuIsa::kAmx) {
      c.bf16_tile_flops = all_threads(context.pool, peak_bf16_amx);
      c.int8_tile_ops = all_threads(context.pool, peak_int8_amx);
    }
  } else if (context.isa == CpuIsa::kAvx2) {
    c.f32_flops = all_threads(context.pool, peak_f32_avx2);
    c.int8_dot_ops = all_threads(context.pool, peak_int8_avx2);
  } else {
    c.f32_flops = all_threads(context.pool, peak_f32_sse2);
  }
  return c;
}

}  // namespace dsv4::bench
