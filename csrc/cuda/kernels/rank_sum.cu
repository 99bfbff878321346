#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kElementThreads)
    rank_sum_kernel(const __grid_constant__ RankSum<T> a, int64_t vecs) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < vecs) rank_sum_vec<W>(a, at);
}

}  // namespace

template <class T>
void rank_sum(const RankSum<T>& a, cudaStream_t stream) {
  if (a.rows * a.columns == 0) return;
  const bool wide = is_vectorizable(a.parts, a.rank_stride) && is_vectorizable(a.out, a.columns) &&
                    is_vectorizable(a.bias, a.columns) && is_vectorizable(a.residual, a.columns);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t vecs = a.rows * a.columns / W;
    rank_sum_kernel<W><<<blocks_of(vecs, kElementThreads), kElementThreads, 0, stream>>>(a, vecs);
  });
  check_launch("rank_sum");
}

#define INSTANTIATE(T) template void rank_sum<T>(const RankSum<T>&, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
