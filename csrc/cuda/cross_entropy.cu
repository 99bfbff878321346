#include "kernels.h"
#include "launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    cross_entropy_stats_kernel(const __grid_constant__ CrossEntropy<T> a, float* stats) {
  __shared__ float scratch[kWarp];
  cross_entropy_stats_row<W>(BlockRowLanes(scratch), a, stats, blockIdx.x);
}

__global__ void __launch_bounds__(kElementThreads)
    cross_entropy_combine_kernel(const float* stats, const int64_t* targets, float* loss,
                                 float* log_sum, int ranks, int64_t rows, int64_t ignored) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) {
    cross_entropy_combine_row(stats, targets, loss, log_sum, ranks, rows, ignored, row);
  }
}

template <int W, class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropy<T> a, const float* log_sum,
                                  const float* dloss, T* dlogits) {
  cross_entropy_backward_row<W>(BlockLanes(), a, log_sum, dloss, dlogits, blockIdx.x);
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

void cross_entropy_combine(const float* stats, const int64_t* targets, float* loss, float* log_sum,
                           int ranks, int64_t rows, int64_t ignored, cudaStream_t stream) {
  if (rows == 0) return;
  cross_entropy_combine_kernel<<<blocks_of(rows, kElementThreads), kElementThreads, 0, stream>>>(
      stats, targets, loss, log_sum, ranks, rows, ignored);
  check_launch("cross_entropy_combine");
}

template <class T>
void cross_entropy_backward(const CrossEntropy<T>& a, const float* log_sum, const float* dloss,
                            T* dlogits, cudaStream_t stream) {
  if (a.rows * a.columns == 0) return;
  const bool wide = is_vectorizable(a.logits, a.stride) && is_vectorizable(dlogits, a.columns);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    cross_entropy_backward_kernel<W>
        <<<unsigned(a.rows), row_threads(a.columns / W), 0, stream>>>(a, log_sum, dloss, dlogits);
  });
  check_launch("cross_entropy_backward");
}

#define INSTANTIATE(T)                                                                   \
  template void cross_entropy_stats<T>(const CrossEntropy<T>&, float*, cudaStream_t);    \
  template void cross_entropy_backward<T>(const CrossEntropy<T>&, const float*, const float*, T*, \
                                          cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
