// moe on the vector instruction sets: slots grouped by expert, two passes of panels over the weights, each read once.
//
//   prepare   rows of x in the form the expert kernels read (a4: quantised)
//   fc1       task = (expert, panel of 16 inter rows): gate and up of its tokens, SwiGLU, h[slot]
//   requant   rows of h in the form of fc2
//   fc2       task = panel of 16 hidden rows: for each expert in order of id y[token] += w2 h, then the shared expert, so
//             that every output element has one owner and one order
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
  PreparedRows x_routed, x_shared, h_routed, h_shared;
  std::vector<const std::byte*> x_rows;  // per slot: its token's prepared row
  WorkBuffer h;
};

// A task covers at most this many slots, so that 4096 tokens on few experts still spread over all threads and the rows a
// panel reads stay in cache.
constexpr int64_t kSlotsPerTask = 128;
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
      : args_(args), pool_(context.pool), kernels_(*panel_kernels(context.isa)), work_(work), exact_(args.precision.exact) {}

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

  ActForm form_of(const Weight& w, bool a4) const { return kernels_.form(w.view.format, a4); }

  // Routed experts of one layer share formats (checked), so rows of x are prepared once for all of them.
  void prepare_x() {
    const bool has_routed = !work_.experts.empty() && !work_.experts.front().shared;
    const bool has_shared = args_.shared != nullptr;
    if (has_routed) {
      const ActiveExpert& first = work_.experts.front();
      const WeightFormat format1 = first.weights->w1.view.format, format2 = first.weights->w2.view.format;
      for (const ActiveExpert& e : work_.experts)
        DSV4_CHECK(e.shared || (e.weights->w1.view.format == format1 && e.weights->w3.view.format == format1 &&
                                e.weights->w2.view.format == format2),
                   "routed experts of one layer have different weight formats");
      work_.x_routed.reset(form_of(first.weights->w1, first.a4), args_.num_tokens, args_.hidden);
      work_.h_routed.reset(form_of(first.weights->w2, first.a4), num_routed_slots(), args_.inter);
    }
    if (has_shared) {
      DSV4_CHECK(args_.shared->w1.view.format == args_.shared->w3.view.format, "shared expert: w1 and w3 differ in format");
      work_.x_shared.reset(form_of(args_.shared->w1, false), args_.num_tokens, args_.hidden);
      work_.h_shared.reset(form_of(args_.shared->w2, false), args_.num_tokens, args_.shared->w1.view.rows);
    }
    for_each(args_.num_tokens, args_.num_tokens >= 2, [&](int64_t token) {
      const float* x = args_.x + token * args_.hidden;
      if (has_routed) work_.x_routed.set(kernels_, token, x);
      if (has_shared) work_.x_shared.set(kernels_, token, x);
    });
    work_.x_rows.resize(work_.slots.size());
    for (const ActiveExpert& e : work_.experts)
      for (int64_t slot = e.slot_begin; slot < e.slot_end; ++slot)
        work_.x_rows[static_cast<size_t>(slot)] =
            (e.shared ? work_.x_shared : work_.x_routed).row(work_.slots[static_cast<size_t>(slot)].token);
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

  void run_fc1() {
    work_.fc1_task_begin.assign(1, 0);
    for (const ActiveExpert& e : work_.experts)
      work_.fc1_task_begin.push_back(work_.fc1_task_begin.back() + ceil_div(e.inter(), kPanelRows) *
                                                                      ceil_div(e.slot_end - e.slot_begin, kSlotsPerTask));
    for_each(work_.fc1_task_begin.back(), true, [&](int64_t task) {
      const auto found = std::upper_bound(work_.fc1_task_begin.begin(), work_.fc1_task_begin.end(), task) - 1;
      const ActiveExpert& e = work_.experts[static_cast<size_t>(found - work_.fc1_task_begin.begin())];
      const int64_t num_panels = ceil_div(e.inter(), kPanelRows);
      const int64_t slot = e.slot_begin + (task - *found) / num_panels * kSlotsPerTask;
      fc1_panel(e, (task - *found) % num_panels * kPanelRows, slot, std::min(slot + kSlotsPerTask, e.slot_end));
    });
  }

  void fc1_panel(const ActiveExpert& e, int64_t row, int64_t slot_begin, int64_t slot_end) {
    const int64_t count = slot_end - slot_begin;
    float* gate = thread_panel_scratch().out.get<float>(2 * count * kPanelRows);
    float* up = gate + count * kPanelRows;
    const ActForm form = (e.shared ? work_.x_shared : work_.x_routed).form();
    const std::byte* const* x = work_.x_rows.data() + slot_begin;
    run_panel(kernels_, e.weights->w1, row, form, x, count, gate);
    run_panel(kernels_, e.weights->w3, row, form, x, count, up);
    for (int64_t i = 0; i < count; ++i)
      kernels_.swiglu(gate + i * kPanelRows, up + i * kPanelRows, work_.slots[static_cast<size_t>(slot_begin + i)].rho,
                      args_.swiglu_limit, !exact_, !exact_ && !e.a4, kPanelRows, h_row(e, slot_begin + i) + row);
  }

  void prepare_h() {
    const int64_t num_routed = num_routed_slots();
    const bool many = static_cast<int64_t>(work_.slots.size()) >= 4;
    const bool cheap = work_.h_routed.form() == ActForm::kF32 && work_.h_shared.form() == ActForm::kF32;
    for_each(num_routed, many && !cheap, [&](int64_t slot) { work_.h_routed.set(kernels_, slot, h_ + slot * routed_h_stride_); });
    if (args_.shared == nullptr) return;
    const float* h = h_ + num_routed * routed_h_stride_;
    for_each(args_.num_tokens, many && !cheap, [&](int64_t token) { work_.h_shared.set(kernels_, token, h + token * shared_h_stride_); });
  }

  // A task is 16 hidden rows for a range of tokens; all experts, so the sum over experts needs no second pass.
  void run_fc2() {
    const int64_t num_panels = ceil_div(args_.hidden, kPanelRows);
    const SpreadTasks spread{num_panels, pool_.num_threads()};
    for_each(spread.num_indices(), true, [&](int64_t idx) {
      if (const int64_t panel = spread.task(idx); panel < num_panels) fc2_panel(panel * kPanelRows);
    });
  }

  void fc2_panel(int64_t row) {
    PanelScratch& scratch = thread_panel_scratch();
    // [num_tokens, 16] sums, then [kSlotsPerTask, 16] results of one expert.
    float* sum = scratch.out.get<float>((args_.num_tokens + kSlotsPerTask) * kPanelRows);
    float* out = sum + args_.num_tokens * kPanelRows;
    std::memset(sum, 0, static_cast<size_t>(args_.num_tokens) * kPanelRows * 4);
    for (const ActiveExpert& e : work_.experts) {
      const PreparedRows& h = e.shared ? work_.h_shared : work_.h_routed;
      const std::byte* const* rows = h.rows() + (e.shared ? 0 : e.slot_begin);
      for (int64_t begin = e.slot_begin; begin < e.slot_end; begin += kSlotsPerTask) {
        const int64_t count = std::min(kSlotsPerTask, e.slot_end - begin);
        run_panel(kernels_, e.weights->w2, row, h.form(), rows + (begin - e.slot_begin), count, out);
        for (int64_t i = 0; i < count; ++i)
          kernels_.add(out + i * kPanelRows, !exact_, kPanelRows, sum + work_.slots[static_cast<size_t>(begin + i)].token * kPanelRows);
      }
    }
    if (!exact_) kernels_.round_bf16(sum, args_.num_tokens * kPanelRows);
    const int64_t num_rows = std::min<int64_t>(kPanelRows, args_.hidden - row);
    for (int64_t token = 0; token < args_.num_tokens; ++token)
      std::memcpy(args_.y + token * args_.hidden + row, sum + token * kPanelRows, static_cast<size_t>(num_rows) * 4);
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
