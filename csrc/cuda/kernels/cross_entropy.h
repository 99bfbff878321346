// Cross entropy over a vocabulary that is split over ranks: what each rank's columns contribute, and
// their gradient. How ranks join the statistics is the caller's.
//
//   statistics  m = max logit, s = sum exp(logit - m), t = the target's logit (0 if it is not here),
//               a = sum (logit - m), m taken as 0 where it is -inf
//   gradient    dlogit = dloss ((1 + 2 z lse) exp(logit - M - L) - (1 - e) [v = target] - e / V)
//               with lse = M + L, M the base: apart, since the sum would round L where M is large
//
// logits [M, V_r] with a row stride, columns offset .. offset + V_r of the vocabulary of V; targets [M]
// int64; statistics [M, 4], L, base and dloss [M] fp32; e label smoothing, z the weight of the z-loss.
// Rows whose target is `ignored` have t = 0 and gradient 0.
#pragma once

#include <cmath>

#include "cuda/kernels/row.h"

namespace pyparallel::cuda {

constexpr int kStats = 4;

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

template <class T>
struct CrossEntropyGradient {
  CrossEntropy<T> logits;
  const float* lse;  // L
  const float* dloss;
  T* dlogits;  // rows of `out_stride`; may be the logits themselves
  int64_t out_stride;
  float on_target;   // 1 - e
  float off_target;  // e / V
  float z_loss;
  const float* base = nullptr;  // M; without it L is the whole log-sum-exp
};

template <int W, class T, class Lanes>
PP_HOST_DEVICE void cross_entropy_stats_row(const Lanes& lanes, const CrossEntropy<T>& a,
                                            float* stats, int64_t row) {
  const T* logits = a.logits + row * a.stride;
  const int64_t target = a.targets[row] - a.offset;
  float largest = -INFINITY, total = 0.0f, plain = 0.0f;
  two_passes<W>(
      lanes, a.columns / W,
      [&](float (&value)[W], int64_t v, bool count) {
        load_vec(value, logits + v * W);
        if (!count) return;
#pragma unroll
        for (int i = 0; i < W; ++i) largest = fmaxf(largest, value[i]);
      },
      [&] { largest = lanes.max(largest); },
      [&](float (&value)[W], int64_t) {
        // A row of -inf alone counts nothing; -inf - -inf would make it NaN.
        const float base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          plain += value[i] - base;
          total += expf(value[i] - base);
        }
      });
  total = lanes.sum(total);
  plain = lanes.sum(plain);
  if (lanes.index() == 0) {
    const bool own = a.targets[row] != a.ignored && target >= 0 && target < a.columns;
    stats[row * kStats] = largest;
    stats[row * kStats + 1] = total;
    stats[row * kStats + 2] = own ? widen(logits[target]) : 0.0f;
    stats[row * kStats + 3] = plain;
  }
}

template <int W, class T, class Lanes>
PP_HOST_DEVICE void cross_entropy_gradient_row(const Lanes& lanes, const CrossEntropyGradient<T>& g,
                                               int64_t row) {
  const CrossEntropy<T>& a = g.logits;
  const T* logits = a.logits + row * a.stride;
  const int64_t target = a.targets[row] - a.offset;
  const bool ignored = a.targets[row] == a.ignored;
  const float lse = g.lse[row], scale = g.dloss[row];
  const float base = g.base == nullptr ? 0.0f : g.base[row];
  const float factor = 1.0f + 2.0f * g.z_loss * (base + lse);
  for (int64_t v = lanes.index(); v < a.columns / W; v += lanes.count()) {
    float value[W];
    load_vec(value, logits + v * W);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float taken = v * W + i == target ? g.on_target : 0.0f;
      const float slope = factor * expf(value[i] - base - lse) - taken - g.off_target;
      // Not a product with 0: an ignored row's logits may be infinite.
      value[i] = ignored ? 0.0f : scale * slope;
    }
    store_vec(g.dlogits + row * g.out_stride + v * W, value);
  }
}

}  // namespace pyparallel::cuda
