// The sum of a reduce-scatter whose partial sums lie side by side in memory.
//
//   out = round(parts[0] + parts[1] + ... + parts[R-1] + bias + residual)
//
// parts [R, M, N] with a stride between ranks, so that a piece of the rows can be summed as soon as it
// is complete; out, residual [M, N] contiguous; bias [N]. In rank order, fp32, rounded once: with
// neither bias nor residual, the bits of core/reduce.h.
#pragma once

#include "core/reduce.h"
#include "cuda/kernels/bias_activation.h"
#include "cuda/kernels/vec.h"

namespace pyparallel::cuda {

template <class T>
struct RankSum {
  const T* parts;
  const T* bias;      // may be null
  const T* residual;  // may be null
  T* out;
  int ranks;
  int64_t rank_stride;
  int64_t rows;
  int64_t columns;
};

// Vec `at` of the [rows, columns / W] grid of vecs.
template <int W, class T>
PP_HOST_DEVICE void rank_sum_vec(const RankSum<T>& a, int64_t at) {
  float total[W];
  load_vec(total, a.parts + at * W);
  for (int r = 1; r < a.ranks; ++r) {
    float next[W];
    load_vec(next, a.parts + r * a.rank_stride + at * W);
#pragma unroll
    for (int i = 0; i < W; ++i) total[i] += next[i];
  }
  add_bias(total, a.bias, at * W % a.columns);
  add_bias(total, a.residual, at * W);
  store_vec(a.out + at * W, total);
}

}  // namespace pyparallel::cuda
