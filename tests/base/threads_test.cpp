// The thread pool: every index exactly once, exceptions, sizes at the edges, no CPU while idle.
#include "base/threads.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/check.h"

namespace dsv4 {
namespace {

class ThreadPoolSizes : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolSizes, ::testing::Values(1, 2, 3, 4, 8));

TEST_P(ThreadPoolSizes, EveryIndexRunsExactlyOnce) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.num_threads(), GetParam());
  for (const int64_t count : {0, 1, 2, 7, 8, 9, 1000, 20000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
    pool.parallel_for(count, [&](int64_t index) { runs[static_cast<size_t>(index)].fetch_add(1); });
    for (auto& run : runs) ASSERT_EQ(run.load(), 1);
  }
}

// Back-to-back loops of every small size: a worker that is late for one loop must not run into the next.
TEST_P(ThreadPoolSizes, ManyShortLoopsInARow) {
  ThreadPool pool(GetParam());
  for (int loop = 0; loop < 3000; ++loop) {
    const int count = loop % 17;
    std::vector<int> seen(static_cast<size_t>(count), -1);  // not atomic: the end of a loop must publish its writes
    pool.parallel_for(count, [&](int64_t index) { seen[static_cast<size_t>(index)] = loop; });
    for (int value : seen) ASSERT_EQ(value, loop);
  }
}

TEST_P(ThreadPoolSizes, ThreadIndicesAreInRangeAndUsedByOneThreadAtATime) {
  ThreadPool pool(GetParam());
  std::vector<std::atomic<int>> busy(static_cast<size_t>(GetParam()));
  std::atomic<int> errors{0};
  pool.parallel_for_with_thread(5000, [&](int64_t, int thread_idx) {
    if (thread_idx < 0 || thread_idx >= GetParam()) {
      ++errors;
      return;
    }
    if (busy[static_cast<size_t>(thread_idx)].fetch_add(1) != 0) ++errors;
    busy[static_cast<size_t>(thread_idx)].fetch_sub(1);
  });
  EXPECT_EQ(errors.load(), 0);
}

TEST_P(ThreadPoolSizes, AnExceptionReachesTheCallerAndThePoolStaysUsable) {
  ThreadPool pool(GetParam());
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(pool.parallel_for(1000,
                                   [&](int64_t index) {
                                     if (index == 13 || index == 500) throw std::runtime_error("body");
                                   }),
                 std::runtime_error);
    std::atomic<int64_t> sum{0};
    pool.parallel_for(100, [&](int64_t index) { sum += index; });
    EXPECT_EQ(sum.load(), 4950);
  }
}

TEST_P(ThreadPoolSizes, CreatedAndDestroyedWithoutWork) {
  for (int round = 0; round < 50; ++round) ThreadPool pool(GetParam());
}

TEST(ThreadPool, PoolsNestWhenTheyAreDifferent) {
  ThreadPool outer(2);
  std::atomic<int> total{0};
  outer.parallel_for(8, [&](int64_t) {
    ThreadPool inner(2);
    inner.parallel_for(10, [&](int64_t) { ++total; });
  });
  EXPECT_EQ(total.load(), 80);
}

TEST(ThreadPool, ZeroMeansAllCpus) {
  EXPECT_GE(available_cpus(), 1);
  EXPECT_EQ(ThreadPool(0).num_threads(), available_cpus());
}

double process_cpu_seconds() {
  struct timespec now {};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

TEST(ThreadPool, AnIdlePoolUsesNoCpu) {
  ThreadPool pool(8);
  std::atomic<int> total{0};
  pool.parallel_for(100, [&](int64_t) { ++total; });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the spin before sleep
  const double before = process_cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  EXPECT_LT(process_cpu_seconds() - before, 0.02);
  pool.parallel_for(100, [&](int64_t) { ++total; });  // and it wakes up
  EXPECT_EQ(total.load(), 200);
}

TEST(ThreadPool, ALoopInsideItsOwnBodyIsRefused) {
  ThreadPool pool(2);
  EXPECT_THROW(pool.parallel_for(4, [&](int64_t) { pool.parallel_for(4, [](int64_t) {}); }), Error);
  ThreadPool other(2);
  std::atomic<int> count{0};
  pool.parallel_for(1, [&](int64_t) { other.parallel_for(4, [&](int64_t) { ++count; }); });
  EXPECT_EQ(count, 4);
}

std::vector<int> affinity_of_this_thread() {
  cpu_set_t set;
  CPU_ZERO(&set);
  EXPECT_EQ(sched_getaffinity(0, sizeof(set), &set), 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

TEST(ThreadPool, PinnedWorkersKeepToOneCpuEachAndTheCallerIsFree) {
  const std::vector<int> before = affinity_of_this_thread(), order = cpus_by_core();
  EXPECT_EQ(std::set<int>(before.begin(), before.end()), std::set<int>(order.begin(), order.end()));
  EXPECT_EQ(static_cast<int>(order.size()), available_cpus());
  constexpr int kThreads = 4;
  ThreadPool pool(kThreads, /*pin=*/true);
  std::vector<std::vector<int>> seen(kThreads);
  std::vector<std::atomic<int>> runs(kThreads);
  // Until every worker has had an iteration; each notes its own affinity.
  for (int round = 0;
       round < 2000 && std::any_of(runs.begin(), runs.end(), [](const auto& r) { return r.load() == 0; }); ++round)
    pool.parallel_for_with_thread(64, [&](int64_t, int thread) {
      seen[static_cast<size_t>(thread)] = affinity_of_this_thread();
      ++runs[static_cast<size_t>(thread)];
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    });
  for (int thread = 1; thread < kThreads; ++thread)
    EXPECT_EQ(seen[static_cast<size_t>(thread)], std::vector<int>{order[static_cast<size_t>(thread) % order.size()]})
        << thread;
  EXPECT_EQ(affinity_of_this_thread(), before);
}

}  // namespace
}  // namespace dsv4
