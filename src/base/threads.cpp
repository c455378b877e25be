// Thread pool: a gate word publishes a loop and counts who joined, an atomic index hands out its iterations.
#include "base/threads.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/check.h"

namespace dsv4 {
namespace {

// About 50 us on a 3 GHz core: longer than the gap between two loops of a decode step, far shorter than a sampling pause.
constexpr int kSpinRounds = 4000;
// The caller gives its core away sooner: a worker that has not finished its last iteration by then was descheduled.
constexpr int kWaitRounds = 800;

void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

// The pool whose loop body this thread is running: a loop inside a loop of the same pool would overwrite its state.
static thread_local const void* running_pool = nullptr;

int available_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::vector<int> cpus_by_core() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {};  // more CPUs than a cpu_set_t has: nobody is pinned
  std::vector<int> first, others;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    // CPUs of one core name the same siblings; where the system does not tell, each CPU counts as a core.
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu " + std::to_string(cpu);
    (cores.insert(siblings).second ? first : others).push_back(cpu);
  }
  first.insert(first.end(), others.begin(), others.end());
  return first;
}

namespace {

// A refusal (a container that changes its CPU set meanwhile, say) only costs speed.
void pin_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  (void)sched_setaffinity(0, sizeof(set), &set);
}

}  // namespace

// The gate of one loop: epoch | closed | joined workers. A worker takes part only if it moves the gate of an open epoch
// from n to n + 1 joined; the caller closes the gate when no iteration is left and waits for those that joined. So a worker
// that wakes late never touches a loop that has ended (it finds the gate closed, or a newer epoch), and a loop never waits
// for a worker that the system has not scheduled.
struct ThreadPool::State {
  static constexpr uint64_t kJoinedMask = (1u << 16) - 1;
  static constexpr uint64_t kClosed = 1u << 16;
  static constexpr int kEpochShift = 17;

  // One loop. Written by the caller while the gate is closed, read by workers that joined.
  Invoke invoke = nullptr;
  const void* context = nullptr;
  int64_t count = 0;

  alignas(64) std::atomic<uint64_t> gate{kClosed};
  alignas(64) std::atomic<int64_t> next_index{0};
  alignas(64) std::atomic<uint64_t> num_finished{0};
  alignas(64) std::atomic<int> num_asleep{0};
  std::atomic<bool> stopping{false};

  std::mutex mutex;
  std::condition_variable wake;
  std::exception_ptr first_error;
  std::vector<std::thread> workers;

  void work(int thread_idx) {
    const void* outer = std::exchange(running_pool, this);
    for (;;) {
      const int64_t index = next_index.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) break;
      try {
        invoke(context, index, thread_idx);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!first_error) first_error = std::current_exception();
        next_index.store(count, std::memory_order_relaxed);
      }
    }
    running_pool = outer;
  }

  // The first gate value of an epoch other than seen.
  uint64_t wait_for_epoch(uint64_t seen) {
    for (int round = 0; round < kSpinRounds; ++round) {
      const uint64_t value = gate.load(std::memory_order_acquire);
      if (value >> kEpochShift != seen) return value;
      cpu_relax();
    }
    std::unique_lock lock(mutex);
    num_asleep.fetch_add(1);
    wake.wait(lock, [&] { return gate.load() >> kEpochShift != seen; });
    num_asleep.fetch_sub(1);
    return gate.load(std::memory_order_acquire);
  }

  void worker_main(int thread_idx) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t value = wait_for_epoch(seen);
      seen = value >> kEpochShift;
      if (stopping.load(std::memory_order_relaxed)) return;
      while ((value & kClosed) == 0 && value >> kEpochShift == seen) {
        if (!gate.compare_exchange_weak(value, value + 1, std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        work(thread_idx);
        num_finished.fetch_add(1, std::memory_order_release);
        break;
      }
    }
  }

  // Opens the next epoch (or, closed, only wakes everybody). Sequentially consistent with num_asleep: either the sleeper
  // sees the new gate or we see the sleeper.
  void publish(uint64_t flags) {
    gate.store(((gate.load(std::memory_order_relaxed) >> kEpochShift) + 1) << kEpochShift | flags);
    if (num_asleep.load() > 0) {
      std::lock_guard lock(mutex);
      wake.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int num_threads, bool pin)
    : num_threads_(num_threads > 0 ? num_threads : available_cpus()), state_(std::make_unique<State>()) {
  DSV4_CHECK(num_threads_ <= 4096, "num_threads = {}", num_threads_);
  const std::vector<int> cpus = pin ? cpus_by_core() : std::vector<int>{};
  for (int idx = 1; idx < num_threads_; ++idx) {
    const int cpu = cpus.empty() ? -1 : cpus[static_cast<size_t>(idx) % cpus.size()];
    state_->workers.emplace_back([state = state_.get(), idx, cpu] {
      if (cpu >= 0) pin_this_thread(cpu);
      state->worker_main(idx);
    });
  }
}

ThreadPool::~ThreadPool() {
  state_->stopping = true;
  state_->publish(State::kClosed);
  for (auto& worker : state_->workers) worker.join();
}

void ThreadPool::run(int64_t count, Invoke invoke, const void* context) {
  if (count <= 0) return;
  if (num_threads_ == 1 || count == 1) {
    for (int64_t index = 0; index < count; ++index) invoke(context, index, 0);
    return;
  }
  State& state = *state_;
  DSV4_CHECK(running_pool != &state, "parallel_for inside a body of the same pool");
  state.invoke = invoke;
  state.context = context;
  state.count = count;
  state.next_index.store(0, std::memory_order_relaxed);
  state.num_finished.store(0, std::memory_order_relaxed);
  state.publish(0);
  state.work(0);
  const uint64_t num_joined = state.gate.fetch_or(State::kClosed, std::memory_order_acq_rel) & State::kJoinedMask;
  for (int round = 0; state.num_finished.load(std::memory_order_acquire) != num_joined; ++round) {
    if (round < kWaitRounds) {
      cpu_relax();
    } else {
      std::this_thread::yield();  // a worker was descheduled: give it the core
    }
  }
  if (state.first_error) std::rethrow_exception(std::exchange(state.first_error, nullptr));
}

}  // namespace dsv4
