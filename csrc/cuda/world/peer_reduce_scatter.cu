#include "cuda/kernels/kernels.h"
#include "cuda/world/peer_launch.h"

namespace pyparallel::cuda {
namespace {

template <class Op, class T>
__global__ void __launch_bounds__(kPeerThreads, 1)
    reduce_scatter_kernel(const __grid_constant__ PeerCall call, T* output, const T* input,
                          const __grid_constant__ Split split) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) {
    const BlockCut cut(split, int(gridDim.x), int(blockIdx.x), kShareGrain<T>);
    reduce_scatter<Op>(m, output, input, cut);
  });
}

}  // namespace

template <class T>
void peer_reduce_scatter(const PeerCall& call, T* output, const T* input, const Split& split,
                         Reduction reduction, cudaStream_t stream) {
  const int blocks = peer_blocks(split.largest(call.peers.size) * int64_t(sizeof(T)));
  switch (reduction) {
    case Reduction::max:
      reduce_scatter_kernel<Max><<<blocks, kPeerThreads, 0, stream>>>(call, output, input, split);
      break;
    case Reduction::min:
      reduce_scatter_kernel<Min><<<blocks, kPeerThreads, 0, stream>>>(call, output, input, split);
      break;
    default:
      reduce_scatter_kernel<Sum><<<blocks, kPeerThreads, 0, stream>>>(call, output, input, split);
  }
  check_launch("peer_reduce_scatter");
}

#define INSTANTIATE(T)                                                                         \
  template void peer_reduce_scatter<T>(const PeerCall&, T*, const T*, const Split&, Reduction, \
                                       cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
