#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    rms_norm_kernel(const __grid_constant__ RmsNorm<T> a) {
  __shared__ float scratch[kWarp];
  rms_norm_row<W>(BlockRowLanes(scratch), a, blockIdx.x);
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackward<T> a) {
  __shared__ float scratch[kWarp];
  rms_norm_backward_row<W>(BlockRowLanes(scratch), a, blockIdx.x);
}

}  // namespace

template <class T>
void rms_norm(const RmsNorm<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = is_vectorizable(a.x, a.hidden) && is_vectorizable(a.weight, a.hidden) &&
                    is_vectorizable(a.y, a.hidden) && is_vectorizable(a.residual, a.hidden) &&
                    is_vectorizable(a.summed, a.hidden);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    rms_norm_kernel<W><<<unsigned(a.rows), row_threads(a.hidden / W), 0, stream>>>(a);
  });
  check_launch("rms_norm");
}

template <class T>
void rms_norm_backward(const RmsNormBackward<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = is_vectorizable(a.dy, a.hidden) && is_vectorizable(a.h, a.hidden) &&
                    is_vectorizable(a.weight, a.hidden) && is_vectorizable(a.dx, a.hidden);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    rms_norm_backward_kernel<W><<<unsigned(a.rows), row_threads(a.hidden / W), 0, stream>>>(a);
  });
  check_launch("rms_norm_backward");
}

#define INSTANTIATE(T)                                        \
  template void rms_norm<T>(const RmsNorm<T>&, cudaStream_t); \
  template void rms_norm_backward<T>(const RmsNormBackward<T>&, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
