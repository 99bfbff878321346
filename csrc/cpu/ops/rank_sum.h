// The ranks' partial sums of some rows, as they have shown them, added up in rank order and finished in
// the same pass over each row. M rows of H elements; every intermediate is rounded to the tensors' own
// precision, as if an all-reduce, an addition and a norm had each stored it: the same bits.
#pragma once

#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/world/group.h"

namespace pyparallel::cpu {

struct RankSum {
  const void* parts[kMaxRanks];  // each [M, H]
  int ranks;
  int64_t M;
  int64_t H;
  Precision precision;  // f32, bf16 or f16, of all but the norm's weight
};

// Shows this rank's rows to the others, and waits for theirs, which stay until the next call on the group.
// `partial` is null where its rows are in own_slot() already; `wide`: it is fp32, and is rounded on its way
// there. std::invalid_argument if they do not fit a slot.
RankSum show_rows(Group& group, const void* partial, bool wide, int64_t M, int64_t H,
                  Precision precision);

// y = sum_r parts_r (+ bias [H])
void rank_sum(const RankSum& sum, const void* bias, void* y);

// h = sum_r parts_r + residual, y = h / sqrt(mean(h^2) + eps) * weight
void rank_sum_residual_rms_norm(const RankSum& sum, const void* residual, const float* weight,
                                float eps, void* h, void* y);

}  // namespace pyparallel::cpu
