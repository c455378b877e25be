// Thread pool: an epoch counter publishes a loop, an atomic index hands out its iterations, a counter reports the end.
#include "base/threads.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"

namespace dsv4 {
namespace {

// About 30 us on a 3 GHz core: longer than the gap between two loops of a decode step, far shorter than a sampling pause.
constexpr int kSpinRounds = 4000;

void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

int available_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

struct ThreadPool::State {
  // One loop. Written by the caller before epoch moves, read by workers after.
  Invoke invoke = nullptr;
  const void* context = nullptr;
  int64_t count = 0;

  alignas(64) std::atomic<uint64_t> epoch{0};
  alignas(64) std::atomic<int64_t> next_index{0};
  alignas(64) std::atomic<int> num_running{0};
  std::atomic<int> num_asleep{0};
  std::atomic<bool> stopping{false};

  std::mutex mutex;
  std::condition_variable wake;
  std::exception_ptr first_error;
  std::vector<std::thread> workers;

  void work(int thread_idx) {
    for (;;) {
      const int64_t index = next_index.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      try {
        invoke(context, index, thread_idx);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!first_error) first_error = std::current_exception();
        next_index.store(count, std::memory_order_relaxed);
      }
    }
  }

  void wait_for_epoch(uint64_t seen) {
    for (int round = 0; round < kSpinRounds; ++round) {
      if (epoch.load(std::memory_order_acquire) != seen) return;
      cpu_relax();
    }
    std::unique_lock lock(mutex);
    num_asleep.fetch_add(1);
    wake.wait(lock, [&] { return epoch.load() != seen; });
    num_asleep.fetch_sub(1);
  }

  void worker_main(int thread_idx) {
    uint64_t seen = 0;
    for (;;) {
      wait_for_epoch(seen);
      seen = epoch.load(std::memory_order_acquire);
      if (stopping.load(std::memory_order_relaxed)) return;
      work(thread_idx);
      num_running.fetch_sub(1, std::memory_order_release);
    }
  }

  void publish() {
    epoch.fetch_add(1);  // sequentially consistent with num_asleep: either the sleeper sees it or we see the sleeper
    if (num_asleep.load() > 0) {
      std::lock_guard lock(mutex);
      wake.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads > 0 ? num_threads : available_cpus()), state_(std::make_unique<State>()) {
  DSV4_CHECK(num_threads_ <= 4096, "num_threads = {}", num_threads_);
  for (int idx = 1; idx < num_threads_; ++idx)
    state_->workers.emplace_back([state = state_.get(), idx] { state->worker_main(idx); });
}

ThreadPool::~ThreadPool() {
  state_->stopping = true;
  state_->publish();
  for (auto& worker : state_->workers) worker.join();
}

void ThreadPool::run(int64_t count, Invoke invoke, const void* context) {
  if (count <= 0) return;
  if (num_threads_ == 1 || count == 1) {
    for (int64_t index = 0; index < count; ++index) invoke(context, index, 0);
    return;
  }
  State& state = *state_;
  state.invoke = invoke;
  state.context = context;
  state.count = count;
  state.next_index.store(0, std::memory_order_relaxed);
  state.num_running.store(num_threads_ - 1, std::memory_order_relaxed);
  state.publish();
  state.work(0);
  for (int round = 0; state.num_running.load(std::memory_order_acquire) != 0; ++round) {
    if (round < kSpinRounds) {
      cpu_relax();
    } else {
      std::this_thread::yield();  // a worker was descheduled: give it the core
    }
  }
  if (state.first_error) std::rethrow_exception(std::exchange(state.first_error, nullptr));
}

}  // namespace dsv4
