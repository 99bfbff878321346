#include "cuda/kernels/kernels.h"
#include "cuda/world/peer_launch.h"

namespace pyparallel::cuda {
namespace {

// One pass of a block over 16-byte packs.
constexpr int64_t kBlockBytes = kPeerThreads * kPackBytes;

template <class Op, bool OneShot, class T>
__global__ void __launch_bounds__(kPeerThreads, 1)
    all_reduce_kernel(const __grid_constant__ PeerCall call, T* data, int64_t n) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) {
    const Part share = share_of<T>(n);
    if (OneShot) {
      one_shot_all_reduce<Op>(m, data + share.begin, share.size());
    } else {
      two_shot_all_reduce<Op>(m, data + share.begin, share.size());
    }
  });
}

template <class Op, class T>
void launch(const PeerCall& call, T* data, int64_t n, bool one_shot, cudaStream_t stream) {
  const int blocks = peer_blocks(n * int64_t(sizeof(T)));
  if (one_shot) {
    all_reduce_kernel<Op, true><<<blocks, kPeerThreads, 0, stream>>>(call, data, n);
  } else {
    all_reduce_kernel<Op, false><<<blocks, kPeerThreads, 0, stream>>>(call, data, n);
  }
  check_launch("peer_all_reduce");
}

}  // namespace

int peer_blocks(int64_t bytes) {
  return int(max_of(1, min_of(kPeerBlocks, ceil_div(bytes, kBlockBytes))));
}

template <class T>
void peer_all_reduce(const PeerCall& call, T* data, int64_t n, Reduction reduction,
                     Algorithm algorithm, cudaStream_t stream) {
  const bool one_shot = algorithm == Algorithm::one_shot;
  switch (reduction) {
    case Reduction::max: return launch<Max>(call, data, n, one_shot, stream);
    case Reduction::min: return launch<Min>(call, data, n, one_shot, stream);
    default: return launch<Sum>(call, data, n, one_shot, stream);
  }
}

#define INSTANTIATE(T)                                                                 \
  template void peer_all_reduce<T>(const PeerCall&, T*, int64_t, Reduction, Algorithm, \
                                   cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
