// Instruction-set detection.
#include "ops/cpu_context.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>

namespace dsv4 {
namespace {

// AMX tiles need the kernel's permission per process (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA = 18).
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return ::syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// GCC 12 has no __builtin_cpu_supports name for the AMX bits: CPUID.7.0:EDX bit 22 (bf16), 24 (tile), 25 (int8). The kernels decode
// weights in fp16 arithmetic (bit 23), which every processor with AMX has, but a virtual machine may hide.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBits = (1u << 22) | (1u << 23) | (1u << 24) | (1u << 25);
  return (d & kBits) == kBits && amx_permitted();
}

constexpr std::array<std::string_view, 4> kNames{"reference", "avx2", "avx512", "amx"};

CpuIsa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kReference;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vbmi");
  if (!avx512) return CpuIsa::kAvx2;
  return has_amx() ? CpuIsa::kAmx : CpuIsa::kAvx512;
}

}  // namespace

CpuIsa best_cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

std::string_view cpu_isa_name(CpuIsa isa) { return kNames[static_cast<size_t>(isa)]; }

std::optional<CpuIsa> cpu_isa_from_name(std::string_view name) {
  for (size_t idx = 0; idx < kNames.size(); ++idx)
    if (kNames[idx] == name) return static_cast<CpuIsa>(idx);
  return std::nullopt;
}

}  // namespace dsv4
