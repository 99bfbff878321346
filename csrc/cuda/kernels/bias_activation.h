// Bias and activation after a matmul, plain and gated (SwiGLU, GeGLU), with their backward.
//
//   plain   y = act(x + bias)                 dx = dy * act'(x + bias)
//   gated   y = act(g) * u                    dg = dy * u * act'(g),  du = dy * act(g)
//           g = gate + gate_bias, u = up + up_bias
//
// x, gate, up [M, N] with row strides of their own, so that gate and up may be halves of one matrix;
// y, dy [M, N] contiguous; biases [N] or null. Each element is a lane's own: no order to keep.
#pragma once

#include "cuda/kernels/activation.h"
#include "cuda/kernels/vec.h"

namespace pyparallel::cuda {

template <class T>
struct BiasActivation {
  const T* x;
  const T* bias;  // may be null
  T* y;           // backward: dx
  const T* dy;    // null: forward
  int64_t rows;
  int64_t columns;
  int64_t x_stride;
  Activation kind;
};

template <class T>
struct GatedActivation {
  const T* gate;
  const T* up;
  const T* gate_bias;  // may be null
  const T* up_bias;    // may be null
  const T* dy;         // null: forward
  T* y;                // forward only
  T* dgate;            // backward only, rows of out_stride
  T* dup;              // backward only, rows of out_stride
  int64_t rows;
  int64_t columns;
  int64_t in_stride;
  int64_t out_stride;
  Activation kind;
};

template <int W, class T>
PP_HOST_DEVICE void add_bias(float (&value)[W], const T* bias, int64_t column) {
  if (bias == nullptr) return;
  float other[W];
  load_vec(other, bias + column);
#pragma unroll
  for (int i = 0; i < W; ++i) value[i] += other[i];
}

// Vec `at` of the [rows, columns / W] grid of vecs.
template <int W, class T>
PP_HOST_DEVICE void bias_activation_vec(const BiasActivation<T>& a, int64_t at) {
  const int64_t vecs = a.columns / W;
  const int64_t row = at / vecs;
  const int64_t column = at % vecs * W;
  float x[W];
  load_vec(x, a.x + row * a.x_stride + column);
  add_bias(x, a.bias, column);
  if (a.dy == nullptr) {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = activate(a.kind, x[i]);
  } else {
    float dy[W];
    load_vec(dy, a.dy + row * a.columns + column);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = dy[i] * activation_slope(a.kind, x[i]);
  }
  store_vec(a.y + row * a.columns + column, x);
}

template <int W, class T>
PP_HOST_DEVICE void gated_activation_vec(const GatedActivation<T>& a, int64_t at) {
  const int64_t vecs = a.columns / W;
  const int64_t row = at / vecs;
  const int64_t column = at % vecs * W;
  float gate[W], up[W];
  load_vec(gate, a.gate + row * a.in_stride + column);
  load_vec(up, a.up + row * a.in_stride + column);
  add_bias(gate, a.gate_bias, column);
  add_bias(up, a.up_bias, column);
  if (a.dy == nullptr) {
#pragma unroll
    for (int i = 0; i < W; ++i) gate[i] = activate(a.kind, gate[i]) * up[i];
    store_vec(a.y + row * a.columns + column, gate);
    return;
  }
  float dy[W], dgate[W], dup[W];
  load_vec(dy, a.dy + row * a.columns + column);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    dgate[i] = dy[i] * up[i] * activation_slope(a.kind, gate[i]);
    dup[i] = dy[i] * activate(a.kind, gate[i]);
  }
  store_vec(a.dgate + row * a.out_stride + column, dgate);
  store_vec(a.dup + row * a.out_stride + column, dup);
}

}  // namespace pyparallel::cuda
