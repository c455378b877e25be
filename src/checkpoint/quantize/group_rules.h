// The three scale rules on rows of binary32 weights: sf and codes of every group, and what was lost.
//
// Written for speed (a group at a time in straight loops that compilers vectorise); the bytes of kModelOpt equal
// encode_nvfp4_weight_group of codec/nvfp4.h, which the tests check.
#pragma once

#include <cstdint>

#include "checkpoint/quantize/quantize.h"
#include "codec/nvfp4.h"

namespace dsv4 {

struct GroupLoss {
  double error_sq = 0;
  double norm_sq = 0;
  int64_t num_saturated = 0;
  int64_t num_zeroed = 0;

  void add(const GroupLoss& other) {
    error_sq += other.error_sq;
    norm_sq += other.norm_sq;
    num_saturated += other.num_saturated;
    num_zeroed += other.num_zeroed;
  }
};

// Largest magnitude of a tensor, and the smallest group amax that is not zero (0 if there is none).
struct AmaxRange {
  float largest = 0;
  float smallest_group = 0;
  void add(const AmaxRange& other);
};

// w: [num_groups, 16], finite
AmaxRange group_amax_range(const float* w, int64_t num_groups);

// The global scale of a tensor under a rule. kModelOpt: amax / 2688. The others double it so that sf may grow by up to two
// (4over6 needs 1.5) where the largest group would leave no room: sf / 2 is exact, so ModelOpt's choice stays among the
// candidates, unless the smallest group's sf would fall into the subnormal codes; then the global is not doubled.
GlobalScale rule_global_scale(const AmaxRange& range, ScaleRule rule);

// w: [num_groups, 16], finite    codes: [num_groups, 8]    sf: [num_groups]
GroupLoss encode_groups(const float* w, int64_t num_groups, GlobalScale global, ScaleRule rule, uint8_t* codes,
                        uint8_t* sf);

}  // namespace dsv4
