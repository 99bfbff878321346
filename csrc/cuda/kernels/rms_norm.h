// RMS norm of rows, with the residual add that precedes it in a transformer.
//
//   h = x + residual                       (rounded to T and stored, where there is a residual)
//   y = h * rstd * weight                  rstd = 1 / sqrt(mean(h^2) + eps)
//   dx = rstd * (g - xhat * mean(g xhat))  g = dy * weight, xhat = h * rstd
//
// x, residual, y, dy, dx [M, H] contiguous; weight [H]; rstd [M] fp32. Arithmetic in fp32, one rounding.
#pragma once

#include <cmath>

#include "cuda/kernels/row.h"

namespace pyparallel::cuda {

template <class T>
struct RmsNorm {
  const T* x;
  const T* residual;  // may be null
  const T* weight;
  T* y;
  T* summed;  // h; null if and only if residual is
  float* rstd;
  int64_t rows;
  int64_t hidden;
  float eps;
};

template <class T>
struct RmsNormBackward {
  const T* dy;
  const T* h;
  const T* weight;
  const float* rstd;
  T* dx;
  int64_t rows;
  int64_t hidden;
};

template <int W, class T, class Lanes>
PP_HOST_DEVICE void rms_norm_row(const Lanes& lanes, const RmsNorm<T>& a, int64_t row) {
  const int64_t start = row * a.hidden;
  float squares = 0.0f;
  float rstd = 0.0f;
  two_passes<W>(
      lanes, a.hidden / W,
      [&](float (&value)[W], int64_t v, bool count) {
        const int64_t at = start + v * W;
        if (a.residual != nullptr && count) {
          float other[W];
          load_vec(value, a.x + at);
          load_vec(other, a.residual + at);
#pragma unroll
          for (int i = 0; i < W; ++i) value[i] = widen(narrow<T>(value[i] + other[i]));
          store_vec(a.summed + at, value);
        } else {
          load_vec(value, (a.residual != nullptr ? a.summed : a.x) + at);
        }
        if (!count) return;
#pragma unroll
        for (int i = 0; i < W; ++i) squares += value[i] * value[i];
      },
      [&] {
        rstd = 1.0f / sqrtf(lanes.sum(squares) / float(a.hidden) + a.eps);
        if (lanes.index() == 0) a.rstd[row] = rstd;
      },
      [&](float (&value)[W], int64_t v) {
        float weight[W];
        load_vec(weight, a.weight + v * W);
#pragma unroll
        for (int i = 0; i < W; ++i) value[i] = value[i] * rstd * weight[i];
        store_vec(a.y + start + v * W, value);
      });
}

template <int W, class T, class Lanes>
PP_HOST_DEVICE void rms_norm_backward_row(const Lanes& lanes, const RmsNormBackward<T>& a,
                                          int64_t row) {
  const int64_t start = row * a.hidden;
  const float rstd = a.rstd[row];
  float product = 0.0f;
  float mean = 0.0f;
  const auto load_xhat = [&](float (&xhat)[W], int64_t v) {
    load_vec(xhat, a.h + start + v * W);
#pragma unroll
    for (int i = 0; i < W; ++i) xhat[i] *= rstd;
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
        for (int i = 0; i < W; ++i) product += g[i] * xhat[i];
      },
      [&] { mean = lanes.sum(product) / float(a.hidden); },
      [&](float (&g)[W], int64_t v) {
        float xhat[W];
        load_xhat(xhat, v);
#pragma unroll
        for (int i = 0; i < W; ++i) g[i] = rstd * (g[i] - xhat[i] * mean);
        store_vec(a.dx + start + v * W, g);
      });
}

}  // namespace pyparallel::cuda
