#include "cuda/kernels/softcap.h"

#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kElementThreads)
    softcap_kernel(const __grid_constant__ Softcap<T> a, int64_t vecs) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < vecs) softcap_vec<W>(a, at);
}

}  // namespace

template <class T>
void softcap(const Softcap<T>& a, cudaStream_t stream) {
  if (a.n == 0) return;
  const bool wide = is_pack_aligned(a.x) && is_pack_aligned(a.dy) && is_pack_aligned(a.y);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t vecs = ceil_div(a.n, W);
    softcap_kernel<W><<<blocks_of(vecs, kElementThreads), kElementThreads, 0, stream>>>(a, vecs);
  });
  check_launch("softcap");
}

#define INSTANTIATE(T) template void softcap<T>(const Softcap<T>&, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
