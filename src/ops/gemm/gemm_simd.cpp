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
  if (!is_col_form(form)) {
    data_ = buffer_.get<std::byte>(num_rows * row_bytes_);
    for (int64_t idx = 0; idx < num_rows; ++idx) rows_[static_cast<size_t>(idx)] = data_ + idx * row_bytes_;
    return;
  }
  // From three blocks on all have one width (one tile configuration serves them); the rows missing in the last are zeros.
  const int64_t num_blocks = ceil_div(num_rows, kTileBlockRows), block_bytes = kTileBlockRows * row_bytes_;
  data_ = buffer_.get<std::byte>(num_blocks * block_bytes);
  for (int64_t block = 0; block < num_blocks; ++block) {
    std::byte* base = data_ + block * block_bytes;
    const int64_t count = std::min(kTileBlockRows, num_rows - block * kTileBlockRows);
    const int32_t width = static_cast<int32_t>(num_blocks > 2 ? kTileBlockRows : count);
    if (width > count) std::memset(base, 0, static_cast<size_t>(block_bytes));
    std::memcpy(base, &width, sizeof(width));
    for (int64_t i = 0; i < count; ++i) rows_[static_cast<size_t>(block * kTileBlockRows + i)] = base;
  }
}

void PreparedRows::set(const PanelKernels& kernels, int64_t idx, const float* x) {
  if (form_ == ActForm::kF32) {
    rows_[static_cast<size_t>(idx)] = reinterpret_cast<const std::byte*>(x);
  } else if (is_col_form(form_)) {
    std::byte* block = data_ + idx / kTileBlockRows * kTileBlockRows * row_bytes_;
    int32_t width;
    std::memcpy(&width, block, sizeof(width));
    kernels.prepare(form_, x, cols_, block + 64 + idx % kTileBlockRows * 4, width * 4);
  } else {
    kernels.prepare(form_, x, cols_, data_ + idx * row_bytes_, 0);
  }
}

void PreparedRows::copy(int64_t idx, const PreparedRows& from, int64_t from_idx) {
  std::memcpy(data_ + idx * row_bytes_, from.row(from_idx), static_cast<size_t>(row_bytes_));
}

namespace {

// Panel of w in the form its kernel reads; one regrouped from an unpacked weight lies in scratch.
const std::byte* panel_records(const Weight& w, int64_t row_begin, WorkBuffer& scratch) {
  if (w.view.format != WeightFormat::kNvfp4) return nullptr;
  if (w.packed != nullptr) return w.packed->panels + row_begin / kPanelRows * w.packed->panel_bytes;
  std::byte* panel = scratch.get<std::byte>(packed_panel_bytes(w.view.cols));
  pack_panel(w.view, row_begin, panel);
  return panel;
}

PanelArgs panel_args(const PanelRef& panel, int idx, ActForm form, const std::byte* const* x, int64_t num_x) {
  PanelScratch& scratch = thread_panel_scratch();
  const WeightView& view = panel.w->view;
  const std::byte* records = panel_records(*panel.w, panel.row_begin, scratch.panel[idx]);
  const int num_rows = static_cast<int>(std::min<int64_t>(kPanelRows, view.rows - panel.row_begin));
  return {&view,    records,   panel.row_begin,
          num_rows, x,         num_x,
          form,     panel.out, scratch.kernel.get<std::byte>(kPanelScratchBytes)};
}

}  // namespace

void run_panel(const PanelKernels& kernels, const Weight& w, int64_t row_begin, ActForm form, const std::byte* const* x,
               int64_t num_x, float* out) {
  kernels.dot(panel_args({&w, row_begin, out}, 0, form, x, num_x));
}

void run_panel_pair(const PanelKernels& kernels, const PanelRef& a, const PanelRef& b, ActForm form,
                    const std::byte* const* x, int64_t num_x) {
  kernels.dot_pair(panel_args(a, 0, form, x, num_x), panel_args(b, 1, form, x, num_x));
}

void prefetch_panel(const Weight& w, int64_t row_begin) {
  constexpr int64_t kBytes = 4096;
  if (w.packed == nullptr) return;
  const std::byte* panel = w.packed->panels + row_begin / kPanelRows * w.packed->panel_bytes;
  for (int64_t at = 0; at < std::min(kBytes, w.packed->panel_bytes); at += 64) __builtin_prefetch(panel + at, 0, 2);
}

namespace {

// Work below this runs on the calling thread: a parallel loop costs about 1 us (three cache lines change hands), in which
// one core reads about 30 KB from its caches; below three times that, two threads gain nothing.
constexpr double kSerialBytes = 96 << 10;
// Rows of x per task: with 4096 columns they stay in the last-level cache; for tiles (bf16) in a second-level one of 2 MB, and
// a block of weights is decoded once for all of them.
constexpr int64_t kChunkTokens = 64, kTileChunkTokens = 128;

double work_bytes(const WeightView& w, int64_t num_tokens) {
  return static_cast<double>(w.stored_bytes()) * static_cast<double>(std::max<int64_t>(1, num_tokens / 2));
}

void store_panel(const GemmArgs& args, const PanelKernels& kernels, int64_t token, int64_t count, int64_t row,
                 float* out) {
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
  x.reset(kernels.form(w.format, {args.x_to_nvfp4, args.x_is_bf16, args.num_tokens}), args.num_tokens, w.cols);
  const int64_t rows_per_task = x.rows_per_task();
  const auto prepare = [&](int64_t idx) {
    const int64_t end = std::min(args.num_tokens, (idx + 1) * rows_per_task);
    for (int64_t token = idx * rows_per_task; token < end; ++token)
      x.set(kernels, token, args.x + token * args.x_stride);
  };

  const bool serial = context.pool.num_threads() == 1 || work_bytes(w, args.num_tokens) < kSerialBytes;
  // Quantising a row of 4096 takes about 5 us, copying it less than one.
  const bool quantised = x.form() == ActForm::kNvfp4 || x.form() == ActForm::kTileRowsNvfp4;
  const bool costly = quantised ? args.num_tokens >= 2 && w.cols >= 1024 : args.num_tokens >= 8;
  const int64_t num_prepare = ceil_div(args.num_tokens, rows_per_task);
  if (serial || x.form() == ActForm::kF32 || !costly) {
    for (int64_t idx = 0; idx < num_prepare; ++idx) prepare(idx);
  } else {
    context.pool.parallel_for(num_prepare, prepare);
  }

  const bool tiles = is_tile_form(x.form());
  const int64_t chunk_tokens = tiles ? kTileChunkTokens : kChunkTokens;
  const int64_t num_panels = ceil_div(w.rows, kPanelRows);
  const int64_t num_chunks = ceil_div(args.num_tokens, chunk_tokens);
  // A task is a run of panels for one chunk of tokens; about 128 KB of weights, so that handing
  // out tasks costs little and a thread reads long stretches. Tiles take panels in pairs.
  const int64_t panel_bytes = std::max<int64_t>(1, w.stored_bytes() / num_panels);
  int64_t panels_per_task = std::max<int64_t>(1, (128 << 10) / (panel_bytes * std::min(args.num_tokens, chunk_tokens)));
  panels_per_task = std::min(panels_per_task, std::max<int64_t>(1, num_panels / (2 * context.pool.num_threads())));
  if (tiles) panels_per_task = round_up(panels_per_task, 2);
  if (serial) panels_per_task = num_panels;
  const int64_t tasks_per_chunk = ceil_div(num_panels, panels_per_task);

  const auto task = [&](int64_t idx) {
    const int64_t token = idx / tasks_per_chunk * chunk_tokens;
    const int64_t count = std::min(chunk_tokens, args.num_tokens - token);
    const int64_t first = idx % tasks_per_chunk * panels_per_task;
    const int64_t last = std::min(num_panels, first + panels_per_task);
    float* out = thread_panel_scratch().out.get<float>(2 * count * kPanelRows);
    const PanelScope scope(kernels, x.form(), x.rows() + token, count, w.cols);
    int64_t panel = first;
    for (; tiles && panel + 2 <= last; panel += 2) {
      const int64_t row = panel * kPanelRows;
      float* out2 = out + count * kPanelRows;
      run_panel_pair(kernels, {args.w, row, out}, {args.w, row + kPanelRows, out2}, x.form(), x.rows() + token, count);
      store_panel(args, kernels, token, count, row, out);
      store_panel(args, kernels, token, count, row + kPanelRows, out2);
    }
    for (; panel < last; ++panel) {
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
