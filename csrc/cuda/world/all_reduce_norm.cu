#include "cuda/kernels/kernels.h"
#include "cuda/world/peer_launch.h"

namespace pyparallel::cuda {
namespace {

// A row is shared by 256 threads: 8192 bf16 elements stay in registers between the two passes.
constexpr int kNormThreads = 256;

template <int W, bool OneShot, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    all_reduce_norm_kernel(const __grid_constant__ PeerCall call,
                           const __grid_constant__ AllReduceNorm<T> a) {
  __shared__ World world;
  __shared__ float scratch[kWarp];
  run_block(call, world, BlockRowLanes(scratch), [&](Member<BlockRowLanes, DeviceWaiter>& m) {
    const Part rows = part_of(a.rows, int(gridDim.x), int(blockIdx.x));
    if (OneShot) {
      one_shot_all_reduce_norm<W>(m, a, rows);
    } else {
      two_shot_all_reduce_norm<W>(m, a, rows);
    }
  });
}

}  // namespace

template <class T>
void peer_all_reduce_norm(const PeerCall& call, const AllReduceNorm<T>& a, Algorithm algorithm,
                          cudaStream_t stream) {
  const int size = call.peers.size;
  const int64_t row_bytes = a.hidden * int64_t(sizeof(T));
  const int64_t slot_rows = call.peers.slot_bytes / max_of(row_bytes, 1);
  if (slot_rows < 1) {
    throw std::invalid_argument(
        "hidden: a row of " + std::to_string(row_bytes) + " bytes does not fit into a slot of " +
        std::to_string(call.peers.slot_bytes) + " bytes; create the group with larger slots");
  }
  bool one_shot = algorithm == Algorithm::one_shot;
  // Two-shot shows R + 2 regions of at least a row, each rounded down to whole lines.
  if ((call.peers.slot_bytes / (size + 2)) / kLine * kLine < row_bytes) one_shot = true;
  const bool wide = is_vectorizable(a.x, a.hidden) && is_vectorizable(a.residual, a.hidden) &&
                    is_vectorizable(a.weight, a.hidden) && is_vectorizable(a.h, a.hidden) &&
                    is_vectorizable(a.y, a.hidden);
  const int blocks = int(max_of(1, min_of(kPeerBlocks, a.rows)));
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (one_shot) {
      all_reduce_norm_kernel<W, true><<<blocks, kNormThreads, 0, stream>>>(call, a);
    } else {
      all_reduce_norm_kernel<W, false><<<blocks, kNormThreads, 0, stream>>>(call, a);
    }
  });
  check_launch("all_reduce_norm");
}

#define INSTANTIATE(T)                                                                       \
  template void peer_all_reduce_norm<T>(const PeerCall&, const AllReduceNorm<T>&, Algorithm, \
                                        cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
