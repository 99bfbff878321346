// Walks a row that is shared over the lanes of a block, and keeps the first part of it in registers.
#pragma once

#include "cuda/kernels/row_lanes.h"
#include "cuda/kernels/vec.h"

namespace pyparallel::cuda {

// Vecs of a row that each lane keeps between two passes; what is longer is read again.
constexpr int kKeptVecs = 4;

// Two passes over a row: first(value, v, true) loads vec v into value and adds to the sums; between()
// reduces them over the lanes; second(value, v) gets the same values, from registers where they fit,
// else by first(value, v, false), which only loads.
template <int W, class Lanes, class First, class Between, class Second>
PP_HOST_DEVICE void two_passes(const Lanes& lanes, int64_t vecs, First first, Between between,
                               Second second) {
  float kept[kKeptVecs][W];
#pragma unroll
  for (int k = 0; k < kKeptVecs; ++k) {
    const int64_t v = lanes.index() + int64_t(k) * lanes.count();
    if (v < vecs) first(kept[k], v, true);
  }
  const int64_t rest = lanes.index() + int64_t(kKeptVecs) * lanes.count();
  for (int64_t v = rest; v < vecs; v += lanes.count()) {
    float value[W];
    first(value, v, true);
  }
  between();
#pragma unroll
  for (int k = 0; k < kKeptVecs; ++k) {
    const int64_t v = lanes.index() + int64_t(k) * lanes.count();
    if (v < vecs) second(kept[k], v);
  }
  for (int64_t v = rest; v < vecs; v += lanes.count()) {
    float value[W];
    first(value, v, false);
    second(value, v);
  }
}

}  // namespace pyparallel::cuda
