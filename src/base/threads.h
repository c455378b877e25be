// A thread pool for data-parallel loops whose results do not depend on the number of threads.
//
// parallel_for(n, body) calls body(i) exactly once for each i in [0, n). Which thread runs which index is unspecified, so
// an op stays deterministic by giving every output element to one index and fixing the order inside it. Workers spin for a
// few microseconds between loops (decode issues about 100 loops per token) and then sleep: an idle pool uses no CPU.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace dsv4 {

class ThreadPool {
 public:
  // num_threads includes the calling thread; 0 = one per CPU this process may run on. pin: worker i keeps to CPU i of
  // cpus_by_core() (modulo their number). The calling thread is never pinned: threads it starts later would inherit that; the
  // first CPU is left for it.
  explicit ThreadPool(int num_threads = 0, bool pin = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Non-owning reference to a callable: no allocation per loop.
  template <class Body>
  void parallel_for(int64_t count, const Body& body) {
    run(
        count, [](const void* context, int64_t index, int) { (*static_cast<const Body*>(context))(index); }, &body);
  }
  // body(index, thread_idx) with thread_idx in [0, num_threads): for per-thread scratch.
  template <class Body>
  void parallel_for_with_thread(int64_t count, const Body& body) {
    run(
        count,
        [](const void* context, int64_t index, int thread) { (*static_cast<const Body*>(context))(index, thread); },
        &body);
  }

 private:
  using Invoke = void (*)(const void* context, int64_t index, int thread_idx);
  void run(int64_t count, Invoke invoke, const void* context);

  struct State;
  int num_threads_;
  std::unique_ptr<State> state_;
};

// CPUs this process may run on (affinity mask), at least 1.
int available_cpus();

// The same CPUs by number: one of each core first, then the second ones of cores that run several threads.
std::vector<int> cpus_by_core();

}  // namespace dsv4
