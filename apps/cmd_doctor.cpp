// dsv4 doctor: what this machine offers and which implementation each op will use, with the reason.
#include <cpuid.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "base/threads.h"
#include "commands.h"
#include "ops/cpu_context.h"
#if defined(DSV4_WITH_CUDA)
#include "gpu/device.h"
#endif

namespace dsv4::app {
namespace {

struct CpuFeature {
  const char* name;
  bool present;
};

struct CpuidLeaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
CpuidLeaf cpuid(unsigned leaf, unsigned subleaf) {
  CpuidLeaf l;
  if (!__get_cpuid_count(leaf, subleaf, &l.a, &l.b, &l.c, &l.d)) return {};
  return l;
}

// What the processor reports; whether the operating system enables it too is what best_cpu_isa() adds.
std::vector<CpuFeature> cpu_features() {
  const CpuidLeaf l1 = cpuid(1, 0), l7 = cpuid(7, 0), l7b = cpuid(7, 1);
  const auto bit = [](unsigned word, int n) { return (word >> n & 1u) != 0; };
  return {{"avx2", bit(l7.b, 5)},         {"fma", bit(l1.c, 12)},         {"f16c", bit(l1.c, 29)},
          {"avx512f", bit(l7.b, 16)},     {"avx512bw", bit(l7.b, 30)},    {"avx512vl", bit(l7.b, 31)},
          {"avx512dq", bit(l7.b, 17)},    {"avx512_vnni", bit(l7.c, 11)}, {"avx512_vbmi", bit(l7.c, 1)},
          {"avx512_bf16", bit(l7b.a, 5)}, {"avx512_fp16", bit(l7.d, 23)}, {"amx_tile", bit(l7.d, 24)},
          {"amx_bf16", bit(l7.d, 22)},    {"amx_int8", bit(l7.d, 25)}};
}

std::string cpu_model_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0 && line.find(':') != std::string::npos) return line.substr(line.find(':') + 2);
  return "unknown";
}

int64_t meminfo_kb(const std::string& key) {
  std::ifstream info("/proc/meminfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind(key + ":", 0) == 0) return std::strtoll(line.c_str() + key.size() + 1, nullptr, 10);
  return -1;
}

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

int numa_nodes() {
  int nodes = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename();
    nodes += name.rfind("node", 0) == 0 && name.find_first_not_of("0123456789", 4) == std::string::npos;
  }
  return nodes > 0 ? nodes : 1;
}

struct Gpu {
  std::string name;
  int major = 0, minor = 0;
  int64_t bytes = 0;
};
struct GpuReport {
  std::string problem;  // why there is none; empty if the driver answered
  int driver = 0;       // 13000 = 13.0
  std::vector<Gpu> gpus;
};

// Asks the driver library directly: works in a build without CUDA.
GpuReport query_gpus() {
  GpuReport report;
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    report.problem = "no NVIDIA driver (libcuda.so.1 not found)";
    return report;
  }
  const auto init = reinterpret_cast<int (*)(unsigned)>(::dlsym(library, "cuInit"));
  const auto version = reinterpret_cast<int (*)(int*)>(::dlsym(library, "cuDriverGetVersion"));
  const auto count = reinterpret_cast<int (*)(int*)>(::dlsym(library, "cuDeviceGetCount"));
  const auto name = reinterpret_cast<int (*)(char*, int, int)>(::dlsym(library, "cuDeviceGetName"));
  const auto attribute = reinterpret_cast<int (*)(int*, int, int)>(::dlsym(library, "cuDeviceGetAttribute"));
  const auto memory = reinterpret_cast<int (*)(size_t*, int)>(::dlsym(library, "cuDeviceTotalMem_v2"));
  if (!init || !version || !count || !name || !attribute || !memory) {
    report.problem = "libcuda.so.1 lacks an expected function";
    return report;
  }
  int code = init(0), num_gpus = 0;
  if (code == 0) code = count(&num_gpus);
  version(&report.driver);
  if (code != 0) {
    report.problem = fmt::format("the driver answers with error {}{}", code, code == 100 ? " (no device)" : "");
    return report;
  }
  for (int device = 0; device < num_gpus; ++device) {
    Gpu gpu;
    char text[128] = {};
    size_t bytes = 0;
    constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;
    name(text, sizeof(text), device);
    attribute(&gpu.major, kComputeCapabilityMajor, device);
    attribute(&gpu.minor, kComputeCapabilityMinor, device);
    memory(&bytes, device);
    gpu.name = text;
    gpu.bytes = static_cast<int64_t>(bytes);
    report.gpus.push_back(gpu);
  }
  return report;
}

struct OpChoice {
  std::string op, choice, reason;
};

std::vector<OpChoice> op_choices(CpuIsa isa) {
  if (isa == CpuIsa::kReference) return {{"all", "reference", "no AVX2 + FMA: plain loops"}};
  const std::string vec = isa == CpuIsa::kAvx2 ? "avx2" : "avx512";
  const std::string why = isa == CpuIsa::kAvx2
                              ? "AVX2 and FMA present, AVX-512 (F, BW, VL, DQ, VNNI, VBMI, BF16) not complete"
                              : "AVX-512 complete";
  const std::string a4 = isa == CpuIsa::kAvx2 ? "int8 products by maddubs" : "int8 products by VNNI";
  const std::string f32 = "binary32 products of exactly decoded weights";
  const OpChoice others{"attention, indexer, compressor, norm, rope, router, hyper_connection", vec, why};
  if (isa == CpuIsa::kAmx)
    return {{"gemm, moe (a16)", "amx",
             "AMX complete; bf16 tiles of exactly decoded weights (avx512 where weights are F32)"},
            {"gemm, moe (a4)", "amx", "the same tiles (with few rows avx512, " + a4 + "), bit for bit the reference"},
            {"gemm, moe (exact)", vec, f32},
            others};
  const std::string no_amx =
      isa == CpuIsa::kAvx512 ? ", AMX (TILE, BF16, INT8, AVX512_FP16) not complete or not permitted" : "";
  return {{"gemm, moe (a16, exact)", vec, why + no_amx + "; " + f32},
          {"gemm, moe (a4)", vec, a4 + ", bit for bit the reference"},
          others};
}

#if defined(DSV4_WITH_CUDA)
// The MoE layer is written for Hopper alone; the other kernels are compiled for DSV4_CUDA_ARCHS.
const char* cuda_kernels(int major, int minor) {
  const bool portable = gpu::has_kernels_for(major, minor), moe = major == 9 && minor == 0;
  if (moe) return portable ? "portable kernels and the MoE layer" : "the MoE layer only";
  return portable ? "portable kernels" : "none: this binary holds no machine code for it";
}
#endif

std::string gibibytes(int64_t bytes) { return fmt::format("{:.1f} GiB", static_cast<double>(bytes) / (1ll << 30)); }

Json report_json() {
  Json features = Json::object();
  for (const CpuFeature& f : cpu_features()) features[f.name] = f.present;
  Json ops = Json::array();
  for (const OpChoice& c : op_choices(best_cpu_isa()))
    ops.push_back({{"op", c.op}, {"choice", c.choice}, {"reason", c.reason}});
  const GpuReport gpus = query_gpus();
  Json devices = Json::array();
  for (const Gpu& g : gpus.gpus)
    devices.push_back(
        {{"name", g.name}, {"compute_capability", fmt::format("{}.{}", g.major, g.minor)}, {"bytes", g.bytes}});
  return {{"cpu",
           {{"model", cpu_model_name()},
            {"cpus", available_cpus()},
            {"numa_nodes", numa_nodes()},
            {"isa", std::string(cpu_isa_name(best_cpu_isa()))},
            {"features", features}}},
          {"memory",
           {{"total_kb", meminfo_kb("MemTotal")},
            {"available_kb", meminfo_kb("MemAvailable")},
            {"transparent_huge_pages", first_line("/sys/kernel/mm/transparent_hugepage/enabled")}}},
          {"gpu", {{"problem", gpus.problem}, {"driver", gpus.driver}, {"devices", devices}}},
          {"ops", ops}};
}

void print_report() {
  std::printf("cpu      %s\n", cpu_model_name().c_str());
  std::printf("         %d CPUs for this process, %d NUMA node(s), instruction set: %s\n", available_cpus(),
              numa_nodes(), std::string(cpu_isa_name(best_cpu_isa())).c_str());
  std::string have, lack;
  for (const CpuFeature& f : cpu_features()) (f.present ? have : lack) += std::string(" ") + f.name;
  std::printf("         has     %s\n         lacks   %s\n", have.c_str(),
              lack.empty() ? " nothing we use" : lack.c_str());
  std::printf("memory   %s, %s available, transparent huge pages: %s\n",
              gibibytes(meminfo_kb("MemTotal") << 10).c_str(), gibibytes(meminfo_kb("MemAvailable") << 10).c_str(),
              first_line("/sys/kernel/mm/transparent_hugepage/enabled").c_str());
  const GpuReport gpus = query_gpus();
  if (!gpus.problem.empty())
    std::printf("gpu      none: %s\n", gpus.problem.c_str());
  else
    std::printf("gpu      driver for CUDA %d.%d, %zu device(s)\n", gpus.driver / 1000, gpus.driver % 1000 / 10,
                gpus.gpus.size());
  for (const Gpu& g : gpus.gpus)
    std::printf("         %s, sm_%d%d, %s\n", g.name.c_str(), g.major, g.minor, gibibytes(g.bytes).c_str());
  std::printf("ops on cpu\n");
  for (const OpChoice& c : op_choices(best_cpu_isa()))
    std::printf("         %s: %s (%s)\n", c.op.c_str(), c.choice.c_str(), c.reason.c_str());
#if defined(DSV4_WITH_CUDA)
  std::printf("ops on cuda\n");
  for (const Gpu& g : gpus.gpus) std::printf("         %s: %s\n", g.name.c_str(), cuda_kernels(g.major, g.minor));
#else
  std::printf("ops on cuda: none, this build has no CUDA (DSV4_CUDA=OFF)\n");
#endif
}

}  // namespace

void register_doctor(CLI::App& app, GlobalOptions&) {
  auto json = std::make_shared<bool>(false);
  CLI::App* command =
      app.add_subcommand("doctor", "what this machine offers and which implementation each op will use");
  command->add_flag("--json", *json, "one JSON object instead of text");
  command->callback([json] {
    if (*json)
      std::printf("%s\n", report_json().dump(2).c_str());
    else
      print_report();
  });
}

}  // namespace dsv4::app
