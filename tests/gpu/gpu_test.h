// Shared by the GPU tests: device copies of host arrays, random rows, and byte comparison that names the first difference.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/check.h"
#include "codec/bf16.h"
#include "gpu/buffer.h"
#include "gpu/context.h"
#include "gpu/device.h"
#include "gpu/stream.h"
#include "ops/cpu_context.h"

namespace dsv4::test {

// Skips, with the reason, where there is no usable GPU.
#define DSV4_NEEDS_GPU()                                                                         \
  do {                                                                                           \
    const ::dsv4::gpu::DeviceList list = ::dsv4::gpu::find_devices();                            \
    if (list.devices.empty()) GTEST_SKIP() << "no GPU: " << list.absence;                        \
    if (!list.devices[0].has_kernels) GTEST_SKIP() << "no kernels for " << list.devices[0].name; \
  } while (false)

struct Machine {
  gpu::Stream stream;
  GpuContext gpu;
  ThreadPool pool;
  CpuContext cpu{pool};

  Machine() {
    gpu.stream = stream.get();
    gpu.num_sms = ::dsv4::gpu::current_device().num_sms;
  }
};

// Device memory with a poisoned guard behind it: kernels must write every byte of the array and none of the guard.
template <class T>
class DeviceArray {
 public:
  static constexpr int64_t kGuardBytes = 256;

  DeviceArray(Machine& machine, int64_t count) : machine_(machine), count_(count), buffer_(bytes() + kGuardBytes) {
    gpu::fill(buffer_.data(), 0xa5, bytes() + kGuardBytes, machine.gpu.stream);
  }
  DeviceArray(Machine& machine, const std::vector<T>& host) : DeviceArray(machine, static_cast<int64_t>(host.size())) {
    gpu::copy_to_device(buffer_.data(), host.data(), bytes(), machine.gpu.stream);
    machine.stream.synchronize();
  }
  T* data() const { return buffer_.template as<T>(); }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  std::vector<T> host() const {
    std::vector<T> result(static_cast<size_t>(count_));
    std::vector<uint8_t> guard(kGuardBytes);
    gpu::copy_to_host(result.data(), buffer_.data(), bytes(), machine_.gpu.stream);
    gpu::copy_to_host(guard.data(), buffer_.template as<uint8_t>() + bytes(), kGuardBytes, machine_.gpu.stream);
    machine_.stream.synchronize();
    for (const uint8_t byte : guard)
      if (byte != 0xa5) {
        ADD_FAILURE() << "a kernel wrote behind an array of " << bytes() << " bytes";
        break;
      }
    return result;
  }

 private:
  Machine& machine_;
  int64_t count_;
  gpu::DeviceBuffer buffer_;
};

template <class T>
void expect_same_bytes(const std::vector<T>& got, const std::vector<T>& want, const char* what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  if (std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0) return;
  int64_t different = 0, first = -1;
  for (size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
      if (first < 0) first = static_cast<int64_t>(i);
      ++different;
    }
  uint64_t g = 0, w = 0;
  std::memcpy(&g, &got[static_cast<size_t>(first)], sizeof(T));
  std::memcpy(&w, &want[static_cast<size_t>(first)], sizeof(T));
  ADD_FAILURE() << what << ": " << different << " of " << got.size() << " elements differ, first at " << first
                << ": got 0x" << std::hex << g << ", want 0x" << w;
}

// Rows of very different size, with zeros of both signs and (every seventh row) all zeros.
inline std::vector<float> random_rows(int64_t rows, int64_t cols, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    const float size = std::ldexp(1.0f, static_cast<int>(random() % 24) - 12);
    for (int64_t c = 0; c < cols; ++c) {
      float value = normal(random) * size;
      if (random() % 64 == 0) value *= 64.0f;
      if (random() % 128 == 0) value = random() % 2 ? 0.0f : -0.0f;
      x[static_cast<size_t>(r * cols + c)] = r % 7 == 6 ? 0.0f : value;
    }
  }
  return x;
}

inline std::vector<bf16> to_bf16(const std::vector<float>& x) {
  std::vector<bf16> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = encode_bf16(x[i]);
  return y;
}

}  // namespace dsv4::test
