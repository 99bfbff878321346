#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    cross_entropy_stats_kernel(const __grid_constant__ CrossEntropy<T> a, float* stats) {
  __shared__ float scratch[kWarp];
  cross_entropy_stats_row<W>(BlockRowLanes(scratch), a, stats, blockIdx.x);
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    cross_entropy_gradient_kernel(const __grid_constant__ CrossEntropyGradient<T> g) {
  cross_entropy_gradient_row<W>(BlockLanes(), g, blockIdx.x);
}

}  // namespace

template <class T>
void cross_entropy_stats(const CrossEntropy<T>& a, float* stats, cudaStream_t stream) {
  if (a.rows == 0) return;
  const bool wide = is_vectorizable(a.logits, a.stride) && a.columns % kVecWidth<T> == 0;
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    cross_entropy_stats_kernel<W>
        <<<unsigned(a.rows), row_threads(a.columns / W), 0, stream>>>(a, stats);
  });
  check_launch("cross_entropy_stats");
}

template <class T>
void cross_entropy_gradient(const CrossEntropyGradient<T>& g, cudaStream_t stream) {
  const CrossEntropy<T>& a = g.logits;
  if (a.rows * a.columns == 0) return;
  const bool wide = is_vectorizable(a.logits, a.stride) &&
                    is_vectorizable(g.dlogits, g.out_stride) && a.columns % kVecWidth<T> == 0;
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    cross_entropy_gradient_kernel<W>
        <<<unsigned(a.rows), row_threads(a.columns / W), 0, stream>>>(g);
  });
  check_launch("cross_entropy_gradient");
}

#define INSTANTIATE(T)                                                                \
  template void cross_entropy_stats<T>(const CrossEntropy<T>&, float*, cudaStream_t); \
  template void cross_entropy_gradient<T>(const CrossEntropyGradient<T>&, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
