// Stream, Event and Graph: owning handles; pass .get() to launches. No default stream is used anywhere.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "gpu/check.h"

namespace dsv4::gpu {

// Move-only owner of a CUDA handle.
template <class Handle, cudaError_t (*kDestroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_) kDestroy(handle_);
  }
  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 protected:
  Handle handle_ = nullptr;
};

class Event : public Owned<cudaEvent_t, cudaEventDestroy> {
 public:
  explicit Event(bool timing = true) {
    DSV4_CUDA(cudaEventCreateWithFlags(&handle_, timing ? cudaEventDefault : cudaEventDisableTiming));
  }
  void record(cudaStream_t stream) { DSV4_CUDA(cudaEventRecord(handle_, stream)); }
  void synchronize() { DSV4_CUDA(cudaEventSynchronize(handle_)); }
};

inline float elapsed_us(const Event& start, const Event& stop) {
  float ms = 0;
  DSV4_CUDA(cudaEventElapsedTime(&ms, start.get(), stop.get()));
  return ms * 1e3f;
}

class Stream : public Owned<cudaStream_t, cudaStreamDestroy> {
 public:
  Stream() { DSV4_CUDA(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking)); }
  void synchronize() const { DSV4_CUDA(cudaStreamSynchronize(handle_)); }
  void wait(const Event& event) const { DSV4_CUDA(cudaStreamWaitEvent(handle_, event.get(), 0)); }
};

// What a callable launches on a stream, as one replayable unit. Programmatic dependent launches become graph edges.
class Graph {
 public:
  template <class Body>
  static Graph capture(const Stream& stream, const Body& body) {
    DSV4_CUDA(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
    cudaGraph_t raw = nullptr;
    try {
      body(stream.get());
    } catch (...) {
      cudaStreamEndCapture(stream.get(), &raw);
      if (raw) cudaGraphDestroy(raw);
      throw;
    }
    DSV4_CUDA(cudaStreamEndCapture(stream.get(), &raw));
    Graph graph;
    graph.graph_ = Owned<cudaGraph_t, cudaGraphDestroy>(raw);
    cudaGraphExec_t exec = nullptr;
    DSV4_CUDA(cudaGraphInstantiate(&exec, raw, 0));
    graph.exec_ = Owned<cudaGraphExec_t, cudaGraphExecDestroy>(exec);
    return graph;
  }
  void launch(cudaStream_t stream) const { DSV4_CUDA(cudaGraphLaunch(exec_.get(), stream)); }

 private:
  Owned<cudaGraph_t, cudaGraphDestroy> graph_;
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> exec_;
};

}  // namespace dsv4::gpu
