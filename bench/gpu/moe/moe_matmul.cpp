// The arithmetic ceiling: a BF16 matrix product through cuBLASLt, loaded at run time so that nothing else depends on it.
#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <vector>

#include "base/check.h"
#include "bench_kernels.h"
#include "gpu_bench.h"
#include "moe_bench.h"

namespace dsv4::bench {
namespace {

struct Library {
  void* handle = nullptr;
  std::string path;
  template <class Function>
  Function* function(const char* name) const {
    void* symbol = dlsym(handle, name);
    if (!symbol) throw_resource("{} has no {}", path, name);
    return reinterpret_cast<Function*>(symbol);
  }
};

// DSV4_CUBLASLT names the file; otherwise the loader's path, then where toolkits put it.
Library open_library() {
  std::vector<std::string> paths;
  if (const char* named = std::getenv("DSV4_CUBLASLT")) paths.push_back(named);
  for (const char* path :
       {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13", "/usr/local/cuda-13.0/lib/libcublasLt.so.13"})
    paths.push_back(path);
  for (const std::string& path : paths)
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return {handle, path};
  throw_resource("libcublasLt.so.13 not found (set DSV4_CUBLASLT to the file)");
}

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) throw_resource("cuBLASLt: {} returned {}", what, static_cast<int>(status));
}

}  // namespace

double measure_bf16_matmul(int n, const gpu::Stream& stream, std::string* library_path) {
  static const Library library = open_library();
  *library_path = library.path;
  const auto create = library.function<decltype(cublasLtCreate)>("cublasLtCreate");
  const auto destroy = library.function<decltype(cublasLtDestroy)>("cublasLtDestroy");
  const auto desc_create = library.function<decltype(cublasLtMatmulDescCreate)>("cublasLtMatmulDescCreate");
  const auto desc_set = library.function<decltype(cublasLtMatmulDescSetAttribute)>("cublasLtMatmulDescSetAttribute");
  const auto layout_create = library.function<decltype(cublasLtMatrixLayoutCreate)>("cublasLtMatrixLayoutCreate");
  const auto preference_create =
      library.function<decltype(cublasLtMatmulPreferenceCreate)>("cublasLtMatmulPreferenceCreate");
  const auto preference_set =
      library.function<decltype(cublasLtMatmulPreferenceSetAttribute)>("cublasLtMatmulPreferenceSetAttribute");
  const auto heuristic = library.function<decltype(cublasLtMatmulAlgoGetHeuristic)>("cublasLtMatmulAlgoGetHeuristic");
  const auto matmul = library.function<decltype(cublasLtMatmul)>("cublasLtMatmul");

  cublasLtHandle_t raw = nullptr;
  check(create(&raw), "cublasLtCreate");
  const std::unique_ptr<cublasLtContext, decltype(destroy)> handle(raw, destroy);
  // Descriptors live as long as the process: a bench makes few.
  cublasLtMatmulDesc_t desc = nullptr;
  check(desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  const cublasOperation_t transpose =
      CUBLAS_OP_T;  // both operands with their contraction axis contiguous, as weights are
  check(desc_set(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose), "set TRANSA");
  cublasLtMatrixLayout_t in = nullptr, out = nullptr;
  const uint64_t size = static_cast<uint64_t>(n);
  check(layout_create(&in, CUDA_R_16BF, size, size, n), "cublasLtMatrixLayoutCreate");
  check(layout_create(&out, CUDA_R_16BF, size, size, n), "cublasLtMatrixLayoutCreate");
  const int64_t elements = int64_t{n} * n;
  const size_t workspace_bytes = size_t{64} << 20;
  gpu::DeviceBuffer a(elements * 2), b(elements * 2), d(elements * 2), workspace(static_cast<int64_t>(workspace_bytes));
  fill_random_bf16(a.data(), elements, 1, stream.get());
  fill_random_bf16(b.data(), elements, 2, stream.get());
  cublasLtMatmulPreference_t preference = nullptr;
  check(preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  check(preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes),
        "set workspace");
  cublasLtMatmulHeuristicResult_t found[4];
  int count = 0;
  check(heuristic(handle.get(), desc, in, in, out, out, preference, 4, found, &count),
        "cublasLtMatmulAlgoGetHeuristic");
  if (count == 0) throw_resource("cuBLASLt has no algorithm for {}^3 in BF16", n);

  const float one = 1.0f, zero = 0.0f;
  double best = 0;
  for (int i = 0; i < count; ++i) {
    const auto call = [&] {
      check(matmul(handle.get(), desc, &one, a.data(), in, b.data(), in, &zero, d.data(), out, d.data(), out,
                   &found[i].algo, workspace.data(), workspace_bytes, stream.get()),
            "cublasLtMatmul");
    };
    const auto start = std::chrono::steady_clock::now();
    do {
      call();
      stream.synchronize();
    } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < 0.2);
    std::vector<double> times;
    gpu::Event from, to;
    for (int repeat = 0; repeat < 15; ++repeat) {
      from.record(stream.get());
      call();
      to.record(stream.get());
      stream.synchronize();
      times.push_back(gpu::elapsed_us(from, to));
    }
    std::nth_element(times.begin(), times.begin() + 7, times.end());
    best = std::max(best, 2.0 * n * n * n / times[7] * 1e-6);
  }
  return best;
}

}  // namespace dsv4::bench
