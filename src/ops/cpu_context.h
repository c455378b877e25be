// What every CPU op needs besides its arguments: the thread pool and the instruction set to use.
#pragma once

#include <optional>
#include <string_view>

#include "base/threads.h"

namespace dsv4 {

// Ordered: a machine that has one has all before it. kReference runs the plain loops that define each op.
enum class CpuIsa : int { kReference = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

CpuIsa best_cpu_isa();                      // best this machine (and operating system) supports
std::string_view cpu_isa_name(CpuIsa isa);  // "reference", "avx2", "avx512", "amx"
std::optional<CpuIsa> cpu_isa_from_name(std::string_view name);

struct CpuContext {
  ThreadPool& pool;
  CpuIsa isa = CpuIsa::kReference;
};

// body(row) for every row, split over the pool only where that pays: a loop over threads costs about 2 us, so blocks hold
// at least kRowBlockWork units (roughly multiply-adds) and small jobs stay on the calling thread.
constexpr int64_t kRowBlockWork = 1 << 15;

template <class Body>
void for_rows(const CpuContext& context, int64_t num_rows, int64_t work_per_row, const Body& body) {
  const int64_t rows_per_block = work_per_row >= kRowBlockWork ? 1 : kRowBlockWork / (work_per_row + 1) + 1;
  const int64_t num_blocks = (num_rows + rows_per_block - 1) / rows_per_block;
  if (num_blocks <= 1) {
    for (int64_t row = 0; row < num_rows; ++row) body(row);
    return;
  }
  context.pool.parallel_for(num_blocks, [&](int64_t block) {
    const int64_t end = (block + 1) * rows_per_block < num_rows ? (block + 1) * rows_per_block : num_rows;
    for (int64_t row = block * rows_per_block; row < end; ++row) body(row);
  });
}

}  // namespace dsv4
