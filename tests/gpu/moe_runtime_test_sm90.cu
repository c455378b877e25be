// How the MoE layer behaves in a stream: captured in a graph, called again and again, beside a kernel that holds SMs, and
// how a wait that never ends is reported.
#include <gtest/gtest.h>
#include <unistd.h>

#define DSV4_SPIN_TIMEOUT 20000000  // cycles, of this file's own kernel
#include "gpu/moe_fixture.cuh"
#include "gpu/sm90/spin.cuh"

namespace dsv4::testing {
namespace {

// Takes whole SMs (all their shared memory) until *release is set or max_ns have passed; *running counts its CTAs.
__global__ void hold_sms(volatile int* running, const volatile int* release, long long max_ns) {
  extern __shared__ uint8_t all[];
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  if (threadIdx.x == 0) {
    all[0] = 1;
    atomicAdd(const_cast<int*>(running), 1);
    __threadfence_system();
    do {
      __nanosleep(2000);
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (*release == 0 && static_cast<long long>(now - start) < max_ns);
  }
}

// Occupies `count` SMs on a stream of its own from construction until release() or max_ns.
class Neighbour {
 public:
  Neighbour(int count, long long max_ns) : flags_(8) {
    flags()[0] = 0;
    flags()[1] = 0;
    constexpr int kBytes = 227 * 1024;
    DSV4_CUDA(cudaFuncSetAttribute(hold_sms, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    hold_sms<<<count, 32, kBytes, stream_.get()>>>(flags(), flags() + 1, max_ns);
    DSV4_CUDA(cudaGetLastError());
    while (flags()[0] < count) usleep(100);
  }
  ~Neighbour() {
    release();
    cudaStreamSynchronize(stream_.get());
  }
  void release() { flags()[1] = 1; }
  bool still_there() const { return cudaStreamQuery(stream_.get()) == cudaErrorNotReady; }

 private:
  volatile int* flags() const { return static_cast<volatile int*>(flags_.data()); }
  gpu::PinnedBuffer flags_;
  gpu::Stream stream_;
};

class MoeRuntime : public MoeGpu {};

// A call whose SMs are reserved ends while its neighbour stays; one that counts on all SMs ends once the neighbour has gone.
// Nothing may be allocated or freed meanwhile: that waits for the whole device.
TEST_F(MoeRuntime, BesideAKernelThatHoldsSms) {
  use(*find_case_shape("demo"));
  constexpr int kHeld = 20;
  for (const int64_t tokens : {8, 100, 400})
    for (const Tier& base : {Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}, Tier{"tiled", ActFormat::kNvfp4}}) {
      if (!tier_can_run(experts.shape, tokens, base)) continue;
      SCOPED_TRACE(::testing::Message() << base.name << ", " << tokens << " tokens");
      const Layer l = layer(tokens, Routing::kUniform, true);
      const DeviceBuffer alone = run(l, base);
      Tier reserved = base;
      reserved.reserved_sms = kHeld;
      const MoePlan plan = make_plan(experts.shape, tokens, base),
                    small_plan = make_plan(experts.shape, tokens, reserved);
      DeviceBuffer workspace(plan.workspace_bytes), y(l.y.bytes()), y_reserved(l.y.bytes());
      init_moe_workspace(workspace.data(), plan_input(experts.shape, tokens, base), stream().get());
      gpu::fill(y.data(), 0xff, y.bytes(), stream().get());
      gpu::fill(y_reserved.data(), 0xff, y.bytes(), stream().get());
      stream().synchronize();
      MoeGpuArgs args = layer_args(experts, l, base, workspace);
      {
        Neighbour neighbour(kHeld, 2'000'000'000);
        args.y = y_reserved.as<bf16>();
        moe_gpu(args, small_plan, stream().get());
        stream().synchronize();
        EXPECT_TRUE(neighbour.still_there()) << "the call waited for its neighbour";
      }
      {
        Neighbour neighbour(kHeld, 3'000'000);
        args.y = y.as<bf16>();
        moe_gpu(args, plan, stream().get());
        stream().synchronize();
      }
      expect_same(alone, y_reserved, "with the SMs reserved");
      expect_same(alone, y, "with no SM reserved");
    }
}

TEST_F(MoeRuntime, GraphReplayGivesTheSameBits) {
  use(*find_case_shape("demo"));
  for (const Tier& tier : {Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}, Tier{"tiled", ActFormat::kNvfp4}}) {
    SCOPED_TRACE(tier.name);
    const Layer a = layer(60, Routing::kUniform, true), b = layer(60, Routing::kZipf, false);
    const DeviceBuffer alone_a = run(a, tier), alone_b = run(b, tier);
    const MoePlan plan = make_plan(experts.shape, 60, tier);
    DeviceBuffer workspace(plan.workspace_bytes), y_a(a.y.bytes()), y_b(b.y.bytes());
    init_moe_workspace(workspace.data(), plan_input(experts.shape, 60, tier), stream().get());
    MoeGpuArgs args_a = layer_args(experts, a, tier, workspace), args_b = layer_args(experts, b, tier, workspace);
    args_a.y = y_a.as<bf16>(), args_b.y = y_b.as<bf16>();
    const gpu::Graph graph = gpu::Graph::capture(stream(), [&](cudaStream_t on) {  // two layers that share a workspace
      for (int i = 0; i < 4; ++i) {
        moe_gpu(args_a, plan, on);
        moe_gpu(args_b, plan, on);
      }
    });
    for (int replay = 0; replay < 5; ++replay) {
      gpu::fill(y_a.data(), 0xff, y_a.bytes(), stream().get());
      gpu::fill(y_b.data(), 0xff, y_b.bytes(), stream().get());
      graph.launch(stream().get());
      stream().synchronize();
      expect_same(alone_a, y_a, "first layer");
      expect_same(alone_b, y_b, "second layer");
    }
  }
}

// One workspace for every size and tier, call after call without a pause.
TEST_F(MoeRuntime, CallsOfManySizesShareAWorkspace) {
  use(*find_case_shape("demo"));
  const std::vector<Tier> tiers{{"ring"}, {"stream"}, {"tiled"}, {"tiled", ActFormat::kNvfp4}};
  int64_t bytes = 0;
  std::vector<Layer> layers;
  std::vector<std::vector<DeviceBuffer>> alone, shared;
  for (const int64_t tokens : {1, 300, 17, 64, 2}) {
    layers.push_back(layer(tokens, Routing::kUniform, false));
    alone.emplace_back(), shared.emplace_back();
    for (const Tier& tier : tiers) {
      alone.back().push_back(run(layers.back(), tier_can_run(experts.shape, tokens, tier) ? tier : Tier{"auto"}));
      shared.back().emplace_back(layers.back().y.bytes());
      bytes = std::max(bytes, make_plan(experts.shape, tokens, tier).workspace_bytes);
    }
  }
  DeviceBuffer workspace(bytes);
  gpu::fill(workspace.data(), 0xff, workspace.bytes(), stream().get());
  init_moe_workspace(workspace.data(), plan_input(experts.shape, 300, {}), stream().get());
  for (int round = 0; round < 20; ++round)
    for (size_t i = 0; i < layers.size(); ++i)
      for (size_t t = 0; t < tiers.size(); ++t) {
        const Tier tier = tier_can_run(experts.shape, layers[i].tokens, tiers[t]) ? tiers[t] : Tier{"auto"};
        MoeGpuArgs args = layer_args(experts, layers[i], tier, workspace);
        args.y = shared[i][t].as<bf16>();
        moe_gpu(args, make_plan(experts.shape, layers[i].tokens, tier), stream().get());
      }
  stream().synchronize();
  for (size_t i = 0; i < layers.size(); ++i)
    for (size_t t = 0; t < tiers.size(); ++t) expect_same(alone[i][t], shared[i][t], tiers[t].name.c_str());
}

// ---- time-outs ----

__global__ void wait_for_ever(const uint32_t* flag) {
  if (threadIdx.x == 3) sm90::spin_until([&] { return sm90::load_acquire(flag) != 0; }, "a flag nobody sets", 7, 11);
}

// Runs in a process of its own: the trap ends its CUDA context.
[[noreturn]] void time_out() {
  dup2(STDERR_FILENO, STDOUT_FILENO);
  uint32_t* flag = nullptr;
  if (cudaMalloc(&flag, 4) != cudaSuccess || cudaMemset(flag, 0, 4) != cudaSuccess) _exit(1);
  wait_for_ever<<<3, 32>>>(flag);
  const cudaError_t code = cudaDeviceSynchronize();
  fprintf(stderr, "then: %s\n", cudaGetErrorString(code));
  fflush(stdout);
  _exit(code == cudaSuccess ? 2 : 42);
}

TEST(MoeSpin, ATimeOutNamesWhatItWaitedFor) {
  if (gpu::find_devices().devices.empty()) GTEST_SKIP() << "no GPU: " << gpu::find_devices().absence;
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(time_out(), ::testing::ExitedWithCode(42),
              "timed out waiting for a flag nobody sets \\(7, 11\\): block [0-2] thread 3");
}

}  // namespace
}  // namespace dsv4::testing
