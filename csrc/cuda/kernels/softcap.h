// Soft-capping: y = cap tanh(x / cap), and dx = dy (1 - tanh^2). In fp32, rounded once.
//
// x, y, dy, dx: n elements, contiguous. Each element is a lane's own: no order to keep.
#pragma once

#include <cmath>

#include "cuda/kernels/vec.h"

// What cudaStream_t points to: the host, which tests the bodies, has no CUDA headers.
struct CUstream_st;

namespace pyparallel::cuda {

template <class T>
struct Softcap {
  const T* x;
  const T* dy;  // null: forward
  T* y;         // backward: dx
  int64_t n;
  float cap;
};

template <int W, class T>
PP_HOST_DEVICE void softcap_at(const Softcap<T>& a, int64_t first) {
  float x[W];
  load_vec(x, a.x + first);
#pragma unroll
  for (int i = 0; i < W; ++i) x[i] = tanhf(x[i] / a.cap);
  if (a.dy == nullptr) {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] *= a.cap;
  } else {
    float dy[W];
    load_vec(dy, a.dy + first);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = dy[i] * ((1.0f - x[i]) * (1.0f + x[i]));
  }
  store_vec(a.y + first, x);
}

// W elements from at * W on; the last may be fewer, and are taken singly.
template <int W, class T>
PP_HOST_DEVICE void softcap_vec(const Softcap<T>& a, int64_t at) {
  if ((at + 1) * W <= a.n) return softcap_at<W>(a, at * W);
  for (int64_t i = at * W; i < a.n; ++i) softcap_at<1>(a, i);
}

template <class T>
void softcap(const Softcap<T>& a, CUstream_st* stream);

}  // namespace pyparallel::cuda
