// What every CPU op needs besides its arguments: the thread pool and the instruction set to use.
#pragma once

#include <optional>
#include <string_view>

#include "base/threads.h"

namespace dsv4 {

// Ordered: a machine that has one has all before it. kReference runs the plain loops that define each op.
enum class CpuIsa : int { kReference = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

CpuIsa best_cpu_isa();                                     // best this machine (and operating system) supports
std::string_view cpu_isa_name(CpuIsa isa);                 // "reference", "avx2", "avx512", "amx"
std::optional<CpuIsa> cpu_isa_from_name(std::string_view name);

struct CpuContext {
  ThreadPool& pool;
  CpuIsa isa = CpuIsa::kReference;
};

}  // namespace dsv4
