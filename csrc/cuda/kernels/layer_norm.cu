#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    layer_norm_kernel(const __grid_constant__ LayerNorm<T> a) {
  __shared__ float scratch[kWarp];
  layer_norm_row<W>(BlockRowLanes(scratch), a, blockIdx.x);
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackward<T> a) {
  __shared__ float scratch[kWarp];
  layer_norm_backward_row<W>(BlockRowLanes(scratch), a, blockIdx.x);
}

}  // namespace

template <class T>
void layer_norm(const LayerNorm<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = is_vectorizable(a.x, a.hidden) && is_vectorizable(a.weight, a.hidden) &&
                    is_vectorizable(a.bias, a.hidden) && is_vectorizable(a.y, a.hidden);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    layer_norm_kernel<W><<<unsigned(a.rows), row_threads(a.hidden / W), 0, stream>>>(a);
  });
  check_launch("layer_norm");
}

template <class T>
void layer_norm_backward(const LayerNormBackward<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = is_vectorizable(a.dy, a.hidden) && is_vectorizable(a.x, a.hidden) &&
                    is_vectorizable(a.weight, a.hidden) && is_vectorizable(a.dx, a.hidden);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    layer_norm_backward_kernel<W><<<unsigned(a.rows), row_threads(a.hidden / W), 0, stream>>>(a);
  });
  check_launch("layer_norm_backward");
}

#define INSTANTIATE(T)                                            \
  template void layer_norm<T>(const LayerNorm<T>&, cudaStream_t); \
  template void layer_norm_backward<T>(const LayerNormBackward<T>&, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
