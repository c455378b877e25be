// moe on the vector instruction sets: slots grouped by expert, two passes of panels over the weights, each read once.
//
//   prepare   rows of x in the form the expert kernels read (a4: quantised; tiles: one row per slot, in order of slots)
//   fc1       task = (expert, run of panels of 16 inter rows): gate and up of its tokens, SwiGLU, h[slot]
//   requant   rows of h in the form of fc2
//   fc2       task = (block of hidden rows, range of tokens): for each expert in order of id y[token] += w2 h, then the
//             shared expert, so that every output element has one owner and one order. A block is several panels, so that an
//             expert's rows of h are read from a near cache for all but the first.
//
// The shared expert is one more expert that every token is routed to, with its own weight format; its slots come last.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "ops/gemm/panel_work.h"
#include "ops/moe/moe_backends.h"

namespace dsv4 {
namespace {

// One activated expert and its slots [slot_begin, slot_end).
struct ActiveExpert {
  const ExpertWeights* weights;
  int64_t slot_begin, slot_end;
  bool a4;
  bool shared;
  int64_t inter() const { return weights->w1.view.rows; }
};

struct Slot {
  int64_t token;
  float rho;
};

// All state of one call; kept per thread so that a decode step allocates nothing.
struct MoeWork {
  std::vector<ActiveExpert> experts;
  std::vector<Slot> slots;
  std::vector<int64_t> next_slot;       // per expert id, while sorting
  std::vector<int64_t> fc1_task_begin;  // per active expert, plus the total
  PreparedRows x_routed, x_slots, x_shared, h_routed, h_shared;
  std::vector<const std::byte*> x_rows;  // per slot: its prepared row
  WorkBuffer h;
};

// A task covers at most this many slots, so that 4096 tokens on few experts still spread over all threads and the rows a
// panel reads stay in cache.
constexpr int64_t kSlotsPerTask = 128;
constexpr int64_t kPanelsPerTask = 4;  // fc1, at most: 300 KB of Flash weights
// fc2: sums of one task, half of a second-level cache; tokens of a range (a multiple of 16, the blocks of column forms).
constexpr int64_t kSumBytes = 256 << 10, kRangeTokens = 512;
constexpr double kSerialFlops = 2e5;  // below: about 6 us of work for four parallel loops of about 1 us

// Stable by token: within an expert, slots are in order of tokens.
void group_slots(const MoeArgs& args, bool a4, MoeWork& work) {
  work.experts.clear();
  work.slots.clear();
  work.next_slot.assign(static_cast<size_t>(args.num_experts) + 1, 0);
  const int64_t num_entries = args.num_tokens * args.num_topk;
  for (int64_t idx = 0; idx < num_entries; ++idx)
    if (args.topk_idx[idx] >= 0) ++work.next_slot[static_cast<size_t>(args.topk_idx[idx])];
  int64_t begin = 0;
  for (int expert = 0; expert < args.num_experts; ++expert) {
    const int64_t count = work.next_slot[static_cast<size_t>(expert)];
    work.next_slot[static_cast<size_t>(expert)] = begin;
    if (count > 0) work.experts.push_back({&args.experts[expert], begin, begin + count, a4, false});
    begin += count;
  }
  const int64_t num_routed = begin;
  work.slots.resize(static_cast<size_t>(num_routed + (args.shared != nullptr ? args.num_tokens : 0)));
  for (int64_t idx = 0; idx < num_entries; ++idx) {
    if (args.topk_idx[idx] < 0) continue;
    const int64_t slot = work.next_slot[static_cast<size_t>(args.topk_idx[idx])]++;
    work.slots[static_cast<size_t>(slot)] = {idx / args.num_topk, args.topk_weights[idx]};
  }
  if (args.shared == nullptr) return;
  work.experts.push_back({args.shared, num_routed, num_routed + args.num_tokens, false, true});
  for (int64_t token = 0; token < args.num_tokens; ++token)
    work.slots[static_cast<size_t>(num_routed + token)] = {token, 1.0f};
}

class MoeRun {
 public:
  MoeRun(const MoeArgs& args, const CpuContext& context, MoeWork& work)
      : args_(args),
        pool_(context.pool),
        kernels_(*panel_kernels(context.isa)),
        work_(work),
        exact_(args.precision.exact) {}

  void run() {
    group_slots(args_, !exact_ && args_.precision.act == ActFormat::kNvfp4, work_);
    serial_ = pool_.num_threads() == 1 || total_flops() < kSerialFlops;
    prepare_x();
    layout_h();
    run_fc1();
    prepare_h();
    run_fc2();
  }

 private:
  double total_flops() const {
    double flops = 0.0;
    for (const ActiveExpert& e : work_.experts)
      flops += 6.0 * static_cast<double>(e.slot_end - e.slot_begin) * static_cast<double>(e.inter() * args_.hidden);
    return flops;
  }

  template <class Body>
  void for_each(int64_t count, bool worth_it, const Body& body) {
    if (serial_ || !worth_it) {
      for (int64_t idx = 0; idx < count; ++idx) body(idx);
    } else {
      pool_.parallel_for(count, body);
    }
  }

  // Column forms come in blocks of 16 rows, which slots of an expert do not start at: for the shared expert only.
  ActForm routed_form(const Weight& w, bool a4) const {
    const int64_t num_experts = static_cast<int64_t>(work_.experts.size()) - (args_.shared != nullptr ? 1 : 0);
    const bool bf16 = !exact_ && w.view.format == WeightFormat::kNvfp4;
    return kernels_.form(w.view.format, {a4, bf16, ceil_div(num_routed_slots(), num_experts)});
  }
  ActForm shared_form(const Weight& w) const {
    return kernels_.form(w.view.format, {false, !exact_, args_.num_tokens});
  }

  // Rows of x or h for fc1 or fc2, given by row(idx) in binary32.
  template <class Row>
  void prepare_rows(PreparedRows& rows, int64_t count, const Row& row) {
    const int64_t step = rows.rows_per_task();
    for_each(ceil_div(count, step), count >= 2 && rows.form() != ActForm::kF32, [&](int64_t task) {
      for (int64_t idx = task * step; idx < std::min(count, (task + 1) * step); ++idx)
        rows.set(kernels_, idx, row(idx));
    });
  }

  // Routed experts of one layer share formats (checked), so rows of x are prepared once for all of them.
  void prepare_x() {
    const int64_t num_routed = num_routed_slots();
    const auto x_row = [&](int64_t token) { return args_.x + token * args_.hidden; };
    work_.x_rows.resize(work_.slots.size());
    if (num_routed > 0) {
      const ActiveExpert& first = work_.experts.front();
      const WeightFormat format1 = first.weights->w1.view.format, format2 = first.weights->w2.view.format;
      for (const ActiveExpert& e : work_.experts)
        DSV4_CHECK(e.shared || (e.weights->w1.view.format == format1 && e.weights->w3.view.format == format1 &&
                                e.weights->w2.view.format == format2),
                   "routed experts of one layer have different weight formats");
      const ActForm form = routed_form(first.weights->w1, first.a4);
      work_.x_routed.reset(form, args_.num_tokens, args_.hidden);
      work_.h_routed.reset(routed_form(first.weights->w2, first.a4), num_routed, args_.inter);
      prepare_rows(work_.x_routed, args_.num_tokens, x_row);
      if (is_tile_form(form)) {
        work_.x_slots.reset(form, num_routed, args_.hidden);
        for_each(num_routed, num_routed >= 16, [&](int64_t slot) {
          work_.x_slots.copy(slot, work_.x_routed, work_.slots[static_cast<size_t>(slot)].token);
        });
      }
      for (int64_t slot = 0; slot < num_routed; ++slot)
        work_.x_rows[static_cast<size_t>(slot)] =
            is_tile_form(form) ? work_.x_slots.row(slot)
                               : work_.x_routed.row(work_.slots[static_cast<size_t>(slot)].token);
    }
    if (args_.shared == nullptr) return;
    DSV4_CHECK(args_.shared->w1.view.format == args_.shared->w3.view.format,
               "shared expert: w1 and w3 differ in format");
    work_.x_shared.reset(shared_form(args_.shared->w1), args_.num_tokens, args_.hidden);
    work_.h_shared.reset(shared_form(args_.shared->w2), args_.num_tokens, args_.shared->w1.view.rows);
    prepare_rows(work_.x_shared, args_.num_tokens, x_row);
    std::copy_n(work_.x_shared.rows(), args_.num_tokens, work_.x_rows.data() + num_routed);
  }

  int64_t num_routed_slots() const {
    return static_cast<int64_t>(work_.slots.size()) - (args_.shared != nullptr ? args_.num_tokens : 0);
  }

  // h rows padded to whole panels: fc1 writes 16 at a time.
  void layout_h() {
    routed_h_stride_ = round_up(args_.inter, kPanelRows);
    shared_h_stride_ = args_.shared != nullptr ? round_up(args_.shared->w1.view.rows, kPanelRows) : 0;
    h_ = work_.h.get<float>(num_routed_slots() * routed_h_stride_ + args_.num_tokens * shared_h_stride_);
  }

  float* h_row(const ActiveExpert& e, int64_t slot) const {
    if (!e.shared) return h_ + slot * routed_h_stride_;
    return h_ + num_routed_slots() * routed_h_stride_ + (slot - e.slot_begin) * shared_h_stride_;
  }

  // A task is a run of panels of one expert for a range of its slots: a thread then reads a stretch of each weight.
  void run_fc1() {
    int64_t num_panels = 0;
    for (const ActiveExpert& e : work_.experts) num_panels += ceil_div(e.inter(), kPanelRows);
    const int64_t run = std::clamp<int64_t>(num_panels / (8 * pool_.num_threads()), 1, kPanelsPerTask);
    const auto num_runs = [run](const ActiveExpert& e) { return ceil_div(ceil_div(e.inter(), kPanelRows), run); };
    work_.fc1_task_begin.assign(1, 0);
    for (const ActiveExpert& e : work_.experts)
      work_.fc1_task_begin.push_back(work_.fc1_task_begin.back() +
                                     num_runs(e) * ceil_div(e.slot_end - e.slot_begin, kSlotsPerTask));
    for_each(work_.fc1_task_begin.back(), true, [&](int64_t task) {
      const auto found = std::upper_bound(work_.fc1_task_begin.begin(), work_.fc1_task_begin.end(), task) - 1;
      const ActiveExpert& e = work_.experts[static_cast<size_t>(found - work_.fc1_task_begin.begin())];
      const int64_t slot = e.slot_begin + (task - *found) / num_runs(e) * kSlotsPerTask;
      const int64_t row = (task - *found) % num_runs(e) * run * kPanelRows;
      fc1_rows(e, row, std::min(e.inter(), row + run * kPanelRows), slot, std::min(slot + kSlotsPerTask, e.slot_end));
    });
  }

  void fc1_rows(const ActiveExpert& e, int64_t row_begin, int64_t row_end, int64_t slot_begin, int64_t slot_end) {
    const int64_t count = slot_end - slot_begin;
    float* gate = thread_panel_scratch().out.get<float>(2 * count * kPanelRows);
    float* up = gate + count * kPanelRows;
    const ActForm form = (e.shared ? work_.x_shared : work_.x_routed).form();
    const std::byte* const* x = work_.x_rows.data() + slot_begin;
    const PanelScope scope(kernels_, form, x, count, args_.hidden);
    for (int64_t row = row_begin; row < row_end; row += kPanelRows) {
      run_panel_pair(kernels_, {&e.weights->w1, row, gate}, {&e.weights->w3, row, up}, form, x, count);
      for (int64_t i = 0; i < count; ++i)
        kernels_.swiglu(gate + i * kPanelRows, up + i * kPanelRows,
                        work_.slots[static_cast<size_t>(slot_begin + i)].rho, args_.swiglu_limit, !exact_,
                        !exact_ && !e.a4, kPanelRows, h_row(e, slot_begin + i) + row);
    }
  }

  void prepare_h() {
    const int64_t num_routed = num_routed_slots();
    if (num_routed > 0)
      prepare_rows(work_.h_routed, num_routed, [&](int64_t slot) { return h_ + slot * routed_h_stride_; });
    if (args_.shared == nullptr) return;
    const float* h = h_ + num_routed * routed_h_stride_;
    prepare_rows(work_.h_shared, args_.num_tokens, [&](int64_t token) { return h + token * shared_h_stride_; });
  }

  // A task takes all experts, so the sum over experts needs no second pass.
  void run_fc2() {
    const int64_t num_panels = ceil_div(args_.hidden, kPanelRows);
    const int64_t range = std::min(args_.num_tokens, kRangeTokens);
    const int64_t by_cache = kSumBytes / (range * kPanelRows * 4), by_threads = num_panels / (4 * pool_.num_threads());
    const int64_t block =
        round_up(std::max<int64_t>(1, std::min(by_cache, by_threads)), 2);  // tiles take panels in pairs
    const int64_t num_blocks = ceil_div(num_panels, block);
    const SpreadTasks spread{num_blocks * ceil_div(args_.num_tokens, range), pool_.num_threads()};
    for_each(spread.num_indices(), true, [&](int64_t idx) {
      const int64_t task = spread.task(idx);
      if (task >= spread.count) return;
      const int64_t panel = task % num_blocks * block, token = task / num_blocks * range;
      fc2_block(panel * kPanelRows, std::min(args_.hidden, (panel + block) * kPanelRows), token,
                std::min(args_.num_tokens, token + range));
    });
  }

  // Hidden rows [row_begin, row_end) of tokens [token_begin, token_end).
  void fc2_block(int64_t row_begin, int64_t row_end, int64_t token_begin, int64_t token_end) {
    PanelScratch& scratch = thread_panel_scratch();
    const int64_t width = round_up(row_end - row_begin, kPanelRows), num_tokens = token_end - token_begin;
    // [num_tokens, width] sums, then 2 x [kSlotsPerTask, 16] results of one expert.
    float* sum = scratch.out.get<float>(num_tokens * width + 2 * kSlotsPerTask * kPanelRows);
    float* out = sum + num_tokens * width;
    std::memset(sum, 0, static_cast<size_t>(num_tokens * width) * 4);
    for (size_t idx = 0; idx < work_.experts.size(); ++idx) {
      const ActiveExpert& e = work_.experts[idx];
      const auto by_token = [](const Slot& slot, int64_t token) { return slot.token < token; };
      const auto first_slot = work_.slots.begin() + e.slot_begin, last_slot = work_.slots.begin() + e.slot_end;
      const int64_t begin = std::lower_bound(first_slot, last_slot, token_begin, by_token) - work_.slots.begin();
      const int64_t end = std::lower_bound(first_slot, last_slot, token_end, by_token) - work_.slots.begin();
      if (begin == end) continue;
      if (idx + 1 < work_.experts.size()) prefetch_panel(work_.experts[idx + 1].weights->w2, row_begin);
      for (int64_t slot = begin; slot < end; slot += kSlotsPerTask)
        fc2_add(e, row_begin, row_end, slot, std::min(kSlotsPerTask, end - slot), sum - token_begin * width, width,
                out);
    }
    if (!exact_) kernels_.round_bf16(sum, num_tokens * width);
    for (int64_t token = 0; token < num_tokens; ++token)
      std::memcpy(args_.y + (token_begin + token) * args_.hidden + row_begin, sum + token * width,
                  static_cast<size_t>(row_end - row_begin) * 4);
  }

  // sum[token] += rows of w2 h for slots [slot, slot + count) of one expert.
  void fc2_add(const ActiveExpert& e, int64_t row_begin, int64_t row_end, int64_t slot, int64_t count, float* sum,
               int64_t width, float* out) {
    const PreparedRows& h = e.shared ? work_.h_shared : work_.h_routed;
    const std::byte* const* rows = h.rows() + (e.shared ? slot - e.slot_begin : slot);
    const auto add = [&](int64_t row, const float* results) {
      for (int64_t i = 0; i < count; ++i)
        kernels_.add(results + i * kPanelRows, !exact_, kPanelRows,
                     sum + work_.slots[static_cast<size_t>(slot + i)].token * width + (row - row_begin));
    };
    const Weight& w = e.weights->w2;
    const PanelScope scope(kernels_, h.form(), rows, count, w.view.cols);
    int64_t row = row_begin;
    for (; row + kPanelRows < row_end; row += 2 * kPanelRows) {
      float* out2 = out + count * kPanelRows;
      run_panel_pair(kernels_, {&w, row, out}, {&w, row + kPanelRows, out2}, h.form(), rows, count);
      add(row, out);
      add(row + kPanelRows, out2);
    }
    if (row >= row_end) return;
    run_panel(kernels_, w, row, h.form(), rows, count, out);
    add(row, out);
  }

  const MoeArgs& args_;
  ThreadPool& pool_;
  const PanelKernels& kernels_;
  MoeWork& work_;
  const bool exact_;
  bool serial_ = false;
  float* h_ = nullptr;
  int64_t routed_h_stride_ = 0, shared_h_stride_ = 0;
};

}  // namespace

void moe_simd(const MoeArgs& args, const CpuContext& context) {
  thread_local MoeWork work;  // the calling thread's; the workers are given references
  MoeRun(args, context, work).run();
}

}  // namespace dsv4
