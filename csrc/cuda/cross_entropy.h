// Cross entropy over a vocabulary that is split over ranks, without gathering the logits.
//
//   stats_r[i]   = max_v z[i, v], sum_v exp(z[i, v] - max), z[i, target] if the target is rank r's
//   loss[i]      = log(sum) + max - z[i, target]             max, sum, target over all ranks
//   dz[i, v]     = (exp(z[i, v] - max) / sum - [v = target]) * dloss[i]
//
// logits [M, V_r] with a row stride, columns offset .. offset + V_r of the vocabulary; targets [M] int64;
// stats [R, M, 3] and loss, log_sum [M] fp32, log_sum = log(sum) + max. Rows whose target is
// `ignored` have loss 0 and gradient 0. Ranks are combined in rank order: the same bits everywhere.
#pragma once

#include <cmath>

#include "row.h"

namespace pyparallel::cuda {

constexpr int kStats = 3;

template <class T>
struct CrossEntropy {
  const T* logits;
  const int64_t* targets;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  int64_t offset;
  int64_t ignored;
};

template <int W, class T, class Lanes>
PP_HOST_DEVICE void cross_entropy_stats_row(const Lanes& lanes, const CrossEntropy<T>& a,
                                            float* stats, int64_t row) {
  const T* logits = a.logits + row * a.stride;
  const int64_t target = a.targets[row] - a.offset;
  float largest = -INFINITY, total = 0.0f;
  two_passes<W>(
      lanes, a.columns / W,
      [&](float(&value)[W], int64_t v, bool count) {
        load_vec(value, logits + v * W);
        if (!count) return;
#pragma unroll
        for (int i = 0; i < W; ++i) largest = fmaxf(largest, value[i]);
      },
      [&] { largest = lanes.max(largest); },
      [&](float(&value)[W], int64_t) {
#pragma unroll
        // A row of -inf alone counts nothing; -inf - -inf would make it NaN.
        for (int i = 0; i < W; ++i) total += largest == -INFINITY ? 0.0f : expf(value[i] - largest);
      });
  total = lanes.sum(total);
  if (lanes.index() == 0) {
    const bool own = target >= 0 && target < a.columns;
    stats[row * kStats] = largest;
    stats[row * kStats + 1] = total;
    stats[row * kStats + 2] = own ? widen(logits[target]) : 0.0f;
  }
}

// One row, one lane. stats [R, M, 3]; the target's logit is on one rank, 0 elsewhere.
PP_HOST_DEVICE void cross_entropy_combine_row(const float* stats, const int64_t* targets, float* loss,
                                              float* log_sum, int ranks, int64_t rows,
                                              int64_t ignored, int64_t row) {
  float largest = -INFINITY;
  for (int r = 0; r < ranks; ++r) largest = fmaxf(largest, stats[(r * rows + row) * kStats]);
  float total = 0.0f, target = 0.0f;
  for (int r = 0; r < ranks; ++r) {
    const float* own = stats + (r * rows + row) * kStats;
    if (own[1] > 0.0f) total += own[1] * expf(own[0] - largest);
    target += own[2];
  }
  log_sum[row] = logf(total) + largest;
  loss[row] = targets[row] == ignored ? 0.0f : log_sum[row] - target;
}

template <int W, class T, class Lanes>
PP_HOST_DEVICE void cross_entropy_backward_row(const Lanes& lanes, const CrossEntropy<T>& a,
                                               const float* log_sum, const float* dloss, T* dlogits,
                                               int64_t row) {
  const T* logits = a.logits + row * a.stride;
  const int64_t target = a.targets[row] - a.offset;
  const float scale = a.targets[row] == a.ignored ? 0.0f : dloss[row];
  const float shift = log_sum[row];
  for (int64_t v = lanes.index(); v < a.columns / W; v += lanes.count()) {
    float value[W];
    load_vec(value, logits + v * W);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float probability = expf(value[i] - shift);
      value[i] = scale == 0.0f ? 0.0f : scale * (probability - (v * W + i == target ? 1.0f : 0.0f));
    }
    store_vec(dlogits + row * a.columns + v * W, value);
  }
}

}  // namespace pyparallel::cuda
