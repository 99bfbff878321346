// Layer norm of rows.
//
//   y = (x - mean) * rstd * weight + bias                  rstd = 1 / sqrt(var + eps), var biased
//   dx = rstd * (g - mean(g) - xhat * mean(g xhat))        g = dy * weight, xhat = (x - mean) * rstd
//
// x, y, dy, dx [M, H] contiguous; weight, bias [H]; mean, rstd [M] fp32. The variance is taken of
// x - x[0], so that a large common offset of the row does not cancel it away.
#pragma once

#include <cmath>

#include "cuda/kernels/row.h"

namespace pyparallel::cuda {

template <class T>
struct LayerNorm {
  const T* x;
  const T* weight;
  const T* bias;  // may be null
  T* y;
  float* mean;
  float* rstd;
  int64_t rows;
  int64_t hidden;
  float eps;
};

template <class T>
struct LayerNormBackward {
  const T* dy;
  const T* x;
  const T* weight;
  const float* mean;
  const float* rstd;
  T* dx;
  int64_t rows;
  int64_t hidden;
};

template <int W, class T, class Lanes>
PP_HOST_DEVICE void layer_norm_row(const Lanes& lanes, const LayerNorm<T>& a, int64_t row) {
  const int64_t start = row * a.hidden;
  const float origin = widen(a.x[start]);
  const float count_inverse = 1.0f / float(a.hidden);
  float total = 0.0f, squares = 0.0f, mean = 0.0f, rstd = 0.0f;
  two_passes<W>(
      lanes, a.hidden / W,
      [&](float (&value)[W], int64_t v, bool count) {
        load_vec(value, a.x + start + v * W);
#pragma unroll
        for (int i = 0; i < W; ++i) value[i] -= origin;
        if (!count) return;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          total += value[i];
          squares += value[i] * value[i];
        }
      },
      [&] {
        mean = lanes.sum(total) * count_inverse;
        const float variance = lanes.sum(squares) * count_inverse - mean * mean;
        rstd = 1.0f / sqrtf(fmaxf(variance, 0.0f) + a.eps);
        if (lanes.index() == 0) {
          a.mean[row] = mean + origin;
          a.rstd[row] = rstd;
        }
      },
      [&](float (&value)[W], int64_t v) {
        float weight[W], bias[W] = {};
        load_vec(weight, a.weight + v * W);
        if (a.bias != nullptr) load_vec(bias, a.bias + v * W);
#pragma unroll
        for (int i = 0; i < W; ++i) value[i] = (value[i] - mean) * rstd * weight[i] + bias[i];
        store_vec(a.y + start + v * W, value);
      });
}

template <int W, class T, class Lanes>
PP_HOST_DEVICE void layer_norm_backward_row(const Lanes& lanes, const LayerNormBackward<T>& a,
                                            int64_t row) {
  const int64_t start = row * a.hidden;
  const float mean = a.mean[row];
  const float rstd = a.rstd[row];
  float total = 0.0f, product = 0.0f;
  const auto load_xhat = [&](float (&xhat)[W], int64_t v) {
    load_vec(xhat, a.x + start + v * W);
#pragma unroll
    for (int i = 0; i < W; ++i) xhat[i] = (xhat[i] - mean) * rstd;
  };
  two_passes<W>(
      lanes, a.hidden / W,
      [&](float (&g)[W], int64_t v, bool count) {
        float weight[W], xhat[W];
        load_vec(g, a.dy + start + v * W);
        load_vec(weight, a.weight + v * W);
#pragma unroll
        for (int i = 0; i < W; ++i) g[i] *= weight[i];
        if (!count) return;
        load_xhat(xhat, v);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          total += g[i];
          product += g[i] * xhat[i];
        }
      },
      [&] {
        total = lanes.sum(total) / float(a.hidden);
        product = lanes.sum(product) / float(a.hidden);
      },
      [&](float (&g)[W], int64_t v) {
        float xhat[W];
        load_xhat(xhat, v);
#pragma unroll
        for (int i = 0; i < W; ++i) g[i] = rstd * (g[i] - total - xhat[i] * product);
        store_vec(a.dx + start + v * W, g);
      });
}

}  // namespace pyparallel::cuda
