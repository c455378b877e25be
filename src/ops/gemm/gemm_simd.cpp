// gemm on the vector instruction sets: prepare the rows of x, then panels x chunks of rows as parallel tasks.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "ops/gemm/gemm_backends.h"
#include "ops/gemm/panel_work.h"

namespace dsv4 {

PanelScratch& thread_panel_scratch() {
  thread_local PanelScratch scratch;
  return scratch;
}

void PreparedRows::reset(ActForm form, int64_t num_rows, int64_t cols) {
  form_ = form;
  cols_ = cols;
  rows_.resize(static_cast<size_t>(num_rows));
  if (form == ActForm::kF32) return;
  row_bytes_ = act_row_bytes(form, cols);
  data_ = buffer_.get<std::byte>(num_rows * row_bytes_);
  for (int64_t idx = 0; idx < num_rows; ++idx) rows_[static_cast<size_t>(idx)] = data_ + idx * row_bytes_;
}

void run_panel(const PanelKernels& kernels, const Weight& w, int64_t row_begin, ActForm form, const std::byte* const* x,
               int64_t num_x, float* out) {
  PanelScratch& scratch = thread_panel_scratch();
  const std::byte* packed = nullptr;
  if (w.view.format == WeightFormat::kNvfp4) {
    if (w.packed != nullptr) {
      packed = w.packed->panels + row_begin / kPanelRows * w.packed->panel_bytes;
    } else {
      std::byte* panel = scratch.panel.get<std::byte>(packed_panel_bytes(w.view.cols));
      pack_panel(w.view, row_begin, panel);
      packed = panel;
    }
  }
  const int num_rows = static_cast<int>(std::min<int64_t>(kPanelRows, w.view.rows - row_begin));
  kernels.dot({&w.view, packed, row_begin, num_rows, x, num_x, form, out, scratch.kernel.get<std::byte>(kPanelScratchBytes)});
}

namespace {

// Work below this runs on the calling thread: a parallel loop costs about 1 us (three cache lines change hands), in which
// one core reads about 30 KB from its caches; below three times that, two threads gain nothing.
constexpr double kSerialBytes = 96 << 10;
constexpr int64_t kChunkTokens = 64;  // rows of x per task: with 4096 columns they stay in the last-level cache

double work_bytes(const WeightView& w, int64_t num_tokens) {
  return static_cast<double>(w.stored_bytes()) * static_cast<double>(std::max<int64_t>(1, num_tokens / 2));
}

void store_panel(const GemmArgs& args, const PanelKernels& kernels, int64_t token, int64_t count, int64_t row, float* out) {
  if (args.round_output) kernels.round_bf16(out, count * kPanelRows);
  const int64_t num_rows = std::min<int64_t>(kPanelRows, args.w->view.rows - row);
  for (int64_t t = 0; t < count; ++t)
    std::memcpy(args.y + (token + t) * args.y_stride + row, out + t * kPanelRows, static_cast<size_t>(num_rows) * 4);
}

}  // namespace

void gemm_simd(const GemmArgs& args, const CpuContext& context) {
  const PanelKernels& kernels = *panel_kernels(context.isa);
  const WeightView& w = args.w->view;
  thread_local PreparedRows prepared;  // the calling thread's; workers only read it
  PreparedRows& x = prepared;
  x.reset(kernels.form(w.format, args.x_to_nvfp4), args.num_tokens, w.cols);
  const auto prepare = [&](int64_t token) { x.set(kernels, token, args.x + token * args.x_stride); };

  const bool serial = context.pool.num_threads() == 1 || work_bytes(w, args.num_tokens) < kSerialBytes;
  // Quantising a row of 4096 takes about 5 us, copying it less than one.
  const bool costly = x.form() == ActForm::kNvfp4 ? args.num_tokens >= 2 && w.cols >= 1024 : args.num_tokens >= 8;
  if (serial || x.form() == ActForm::kF32 || !costly) {
    for (int64_t token = 0; token < args.num_tokens; ++token) prepare(token);
  } else {
    context.pool.parallel_for(args.num_tokens, prepare);
  }

  const int64_t num_panels = ceil_div(w.rows, kPanelRows);
  const int64_t num_chunks = ceil_div(args.num_tokens, kChunkTokens);
  // A task is a run of panels for one chunk of tokens; about 128 KB of weights, so that handing
  // out tasks costs little and a thread reads long stretches.
  const int64_t panel_bytes = std::max<int64_t>(1, w.stored_bytes() / num_panels);
  int64_t panels_per_task = std::max<int64_t>(1, (128 << 10) / (panel_bytes * std::min(args.num_tokens, kChunkTokens)));
  panels_per_task = std::min(panels_per_task, std::max<int64_t>(1, num_panels / (2 * context.pool.num_threads())));
  if (serial) panels_per_task = num_panels;
  const int64_t tasks_per_chunk = ceil_div(num_panels, panels_per_task);

  const auto task = [&](int64_t idx) {
    const int64_t token = idx / tasks_per_chunk * kChunkTokens;
    const int64_t count = std::min(kChunkTokens, args.num_tokens - token);
    const int64_t first = idx % tasks_per_chunk * panels_per_task;
    const int64_t last = std::min(num_panels, first + panels_per_task);
    float* out = thread_panel_scratch().out.get<float>(count * kPanelRows);
    for (int64_t panel = first; panel < last; ++panel) {
      run_panel(kernels, *args.w, panel * kPanelRows, x.form(), x.rows() + token, count, out);
      store_panel(args, kernels, token, count, panel * kPanelRows, out);
    }
  };
  if (serial) {
    for (int64_t idx = 0; idx < tasks_per_chunk * num_chunks; ++idx) task(idx);
  } else {
    const SpreadTasks spread{tasks_per_chunk * num_chunks, context.pool.num_threads()};
    context.pool.parallel_for(spread.num_indices(), [&](int64_t idx) {
      if (const int64_t mine = spread.task(idx); mine < spread.count) task(mine);
    });
  }
}

}  // namespace dsv4
