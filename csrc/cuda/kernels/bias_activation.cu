#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kElementThreads)
    bias_activation_kernel(const __grid_constant__ BiasActivation<T> a, int64_t vecs) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < vecs) bias_activation_vec<W>(a, at);
}

template <int W, class T>
__global__ void __launch_bounds__(kElementThreads)
    gated_activation_kernel(const __grid_constant__ GatedActivation<T> a, int64_t vecs) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < vecs) gated_activation_vec<W>(a, at);
}

}  // namespace

template <class T>
void bias_activation(const BiasActivation<T>& a, cudaStream_t stream) {
  if (a.rows * a.columns == 0) return;
  const bool wide = is_vectorizable(a.x, a.x_stride) && is_vectorizable(a.y, a.columns) &&
                    is_vectorizable(a.bias, a.columns) && is_vectorizable(a.dy, a.columns);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t vecs = a.rows * (a.columns / W);
    bias_activation_kernel<W>
        <<<blocks_of(vecs, kElementThreads), kElementThreads, 0, stream>>>(a, vecs);
  });
  check_launch("bias_activation");
}

template <class T>
void gated_activation(const GatedActivation<T>& a, cudaStream_t stream) {
  if (a.rows * a.columns == 0) return;
  const bool wide = is_vectorizable(a.gate, a.in_stride) && is_vectorizable(a.up, a.in_stride) &&
                    is_vectorizable(a.gate_bias, a.columns) &&
                    is_vectorizable(a.up_bias, a.columns) && is_vectorizable(a.dy, a.columns) &&
                    is_vectorizable(a.y, a.columns) && is_vectorizable(a.dgate, a.out_stride) &&
                    is_vectorizable(a.dup, a.out_stride);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t vecs = a.rows * (a.columns / W);
    gated_activation_kernel<W>
        <<<blocks_of(vecs, kElementThreads), kElementThreads, 0, stream>>>(a, vecs);
  });
  check_launch("gated_activation");
}

#define INSTANTIATE(T)                                                      \
  template void bias_activation<T>(const BiasActivation<T>&, cudaStream_t); \
  template void gated_activation<T>(const GatedActivation<T>&, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
