// What gemm and moe share on top of PanelKernels: prepared rows, per-thread scratch, one panel of a Weight.
#pragma once

#include <memory>
#include <vector>

#include "base/math.h"
#include "ops/gemm/gemm_pack.h"
#include "ops/gemm/packed_weight.h"
#include "ops/gemm/panel.h"

namespace dsv4 {

// Grows, never shrinks, 64-byte aligned. Reused between calls so that a decode step allocates nothing.
class WorkBuffer {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (bytes > bytes_) {
      data_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
      bytes_ = bytes;
    }
    const uintptr_t address = (reinterpret_cast<uintptr_t>(data_.get()) + 63) / 64 * 64;
    return reinterpret_cast<T*>(address);
  }

 private:
  std::unique_ptr<std::byte[]> data_;
  size_t bytes_ = 0;
};

// Per thread: scratch of the dense kernels, a panel regrouped from an unpacked weight, results of one panel.
struct PanelScratch {
  WorkBuffer kernel, panel, out;
};
PanelScratch& thread_panel_scratch();

// Activation rows in the form of one kernel family, row pointers included.
class PreparedRows {
 public:
  void reset(ActForm form, int64_t num_rows, int64_t cols);
  // Row idx from x; rows may be set from several threads at once.
  void set(const PanelKernels& kernels, int64_t idx, const float* x) {
    if (form_ == ActForm::kF32) rows_[static_cast<size_t>(idx)] = reinterpret_cast<const std::byte*>(x);
    else kernels.prepare(form_, x, cols_, data_ + idx * row_bytes_);
  }
  ActForm form() const { return form_; }
  const std::byte* const* rows() const { return rows_.data(); }
  const std::byte* row(int64_t idx) const { return rows_[static_cast<size_t>(idx)]; }

 private:
  ActForm form_ = ActForm::kF32;
  int64_t cols_ = 0, row_bytes_ = 0;
  std::byte* data_ = nullptr;
  WorkBuffer buffer_;
  std::vector<const std::byte*> rows_;
};

// Hands out count tasks in an order in which neighbours do not run at the same time: task idx of the pool becomes task
// idx / ways of stretch idx % ways. Neighbouring panels share cache lines of the output (64 bytes a row, seldom aligned);
// two threads on them at once passed each line back and forth for every row (demo shapes, 256 rows: no gain from a second
// thread before, see docs/kernels/cpu.md). It also lets each thread read one long stretch of weights.
struct SpreadTasks {
  int64_t count, ways;
  int64_t stretch() const { return ceil_div(count, ways); }
  int64_t num_indices() const { return stretch() * ways; }
  int64_t task(int64_t idx) const { return idx % ways * stretch() + idx / ways; }  // >= count: nothing to do
};

// out: [num_x, 16] = 16 rows of w from row_begin (a multiple of 16) times x.
void run_panel(const PanelKernels& kernels, const Weight& w, int64_t row_begin, ActForm form, const std::byte* const* x,
               int64_t num_x, float* out);

}  // namespace dsv4
