// Where the parts of the caller's MoE workspace lie. The counters of the ring and the streaming tier come first and are nobody else's.
#pragma once

#include <cstdint>

#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_plan.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4 {

struct MoeWorkspace {
  // ring and streaming tier; zero before the first call (init_moe_workspace), left zero by every call
  int64_t fc1_done = 0, fc2_done = 0, exited = 0, drawn = 0, ticket_stream = 0, counter_bytes = 0;
  // scratch
  int64_t h = 0, slot_y = 0;  // all tiers
  int64_t tiles = 0, num_tiles = 0, expert_rows = 0, row_slot = 0, slot_row = 0, ticket = 0, tile_done = 0,
          x_rows = 0;                              // tiled
  int64_t h_wide = 0, x_global = 0, h_global = 0;  // tiled, a4
  int64_t shared_h = 0, shared_y = 0;              // shared expert
  int64_t bytes = 0;
};

constexpr MoeWorkspace layout_moe_workspace(const MoePlanInput& in, MoeTier tier) {
  MoeWorkspace w;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += (bytes + 255) / 256 * 256;
    return offset;
  };
  const int64_t slots = in.num_tokens * in.num_topk;
  w.fc1_done = take(sm90::kStreamMaxChunks * 4);
  w.fc2_done = take(moe_fc2_strips(in.hidden) * 4);
  w.exited = take(4);
  w.drawn = take(4);
  w.ticket_stream = take(16);
  w.counter_bytes = at;
  w.slot_y = take(slots * in.hidden * 2);
  if (tier != MoeTier::kTiled) {
    w.h = take(slots * in.inter * 2);
  } else {
    const int64_t rows = sm90::moe_max_rows(slots, in.num_experts), tiles = sm90::moe_max_tiles(slots, in.num_experts);
    w.h = take(rows * in.inter * 2);
    w.tiles = take(sm90::kTileLists * tiles * static_cast<int64_t>(sizeof(sm90::MoeTile)));
    w.num_tiles = take(4 * sm90::kTileLists);
    w.expert_rows = take(in.num_experts * int64_t{8});
    w.row_slot = take(rows * 4);
    w.slot_row = take(slots * 4);
    w.ticket = take(16 * sm90::kTileLists);
    w.tile_done = take(sm90::kTileLists * tiles * 4);
    w.x_rows = take(rows * in.hidden * 2);
    if (in.act == ActFormat::kNvfp4) {
      w.h_wide = take(rows * in.inter * 4);
      w.x_global = take(rows * 4);
      w.h_global = take(rows * 4);
    }
  }
  if (in.shared_inter > 0) {
    w.shared_h = take(in.num_tokens * in.shared_inter * 2);
    w.shared_y = take(in.num_tokens * in.hidden * 2);
  }
  w.bytes = at;
  return w;
}

}  // namespace dsv4
