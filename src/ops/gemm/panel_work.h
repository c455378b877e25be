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
  WorkBuffer kernel, panel[2], out;
};
PanelScratch& thread_panel_scratch();

// Activation rows in the form of one kernel family, row pointers included.
class PreparedRows {
 public:
  void reset(ActForm form, int64_t num_rows, int64_t cols);
  // Row idx from x; rows may be set from several threads at once, best rows_per_task() neighbours by one thread.
  void set(const PanelKernels& kernels, int64_t idx, const float* x);
  // Row idx from a prepared one; not for column forms.
  void copy(int64_t idx, const PreparedRows& from, int64_t from_idx);
  ActForm form() const { return form_; }
  int64_t rows_per_task() const { return is_col_form(form_) ? kTileBlockRows : 1; }  // they share cache lines
  const std::byte* const* rows() const { return rows_.data(); }
  const std::byte* row(int64_t idx) const { return rows_[static_cast<size_t>(idx)]; }

 private:
  static constexpr int64_t kTileBlockRows = 16;
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

// Around run_panel and run_panel_pair with the same form and rows of x, on one thread.
class PanelScope {
 public:
  PanelScope(const PanelKernels& kernels, ActForm form, const std::byte* const* x, int64_t num_x, int64_t cols)
      : kernels_(kernels), form_(form) {
    kernels.enter(form, x, num_x, cols);
  }
  ~PanelScope() { kernels_.leave(form_); }
  PanelScope(const PanelScope&) = delete;
  PanelScope& operator=(const PanelScope&) = delete;

 private:
  const PanelKernels& kernels_;
  ActForm form_;
};

// out: [num_x, 16] = 16 rows of w from row_begin (a multiple of 16) times x.
void run_panel(const PanelKernels& kernels, const Weight& w, int64_t row_begin, ActForm form, const std::byte* const* x,
               int64_t num_x, float* out);

// Two panels of equal shape and format that meet the same rows of x: tiles then read each row once for both.
struct PanelRef {
  const Weight* w;
  int64_t row_begin;
  float* out;
};
void run_panel_pair(const PanelKernels& kernels, const PanelRef& a, const PanelRef& b, ActForm form,
                    const std::byte* const* x, int64_t num_x);

// Asks for the beginning of a packed panel: no hardware stream knows that it comes next. Nothing for other weights.
void prefetch_panel(const Weight& w, int64_t row_begin);

}  // namespace dsv4
