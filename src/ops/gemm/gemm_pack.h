// Packing NVFP4 weights for the vector kernels: done once at load, in parallel. Pays where the stored rows would have to be
// regrouped at every use: one token reads each weight once, and regrouping costs about as much as the product.
//
// Packed form (the same for every instruction set): panels of 16 output rows; a panel is a sequence of records of 64
// columns: 8 x [16 rows] 32-bit words (word b of row r = the codes of columns 8b..8b+7 as stored), then 4 x [16 rows] scale
// factors. 576 bytes, so a panel is one forward stream. Rows are padded to 16 and columns to 64 with zero codes and scales.
// Size: stored size rounded up. Without packing the same kernels run on a panel regrouped into thread scratch.
#pragma once

#include <functional>
#include <span>

#include "ops/cpu_context.h"
#include "ops/gemm/weight.h"

namespace dsv4 {

// True if packing speeds this weight up on this instruction set (NVFP4 on a vector ISA). Others run from the stored form.
bool packing_pays(const WeightView& w, CpuIsa isa);

int64_t packed_bytes(const WeightView& w);

// Fills weight->packed for every weight where packing_pays; the others are left alone. One memory area per call, on huge
// pages where the system grants them; each page is first touched by the thread that fills it, and on machines with several
// memory nodes pages go to them in turn. The stored data is read once
// and is not needed by gemm/moe afterwards (the view's pointers stay, so a mapped file's pages can be dropped).
// progress(done_bytes, total_bytes) is called from the calling thread, in increasing order; it may be empty.
void pack_weights(std::span<Weight* const> weights, const CpuContext& context,
                  const std::function<void(int64_t, int64_t)>& progress = {});

// The 16 rows from row_begin, packed; dst: packed_panel_bytes(w.cols).
void pack_panel(const WeightView& w, int64_t row_begin, std::byte* dst);

}  // namespace dsv4
