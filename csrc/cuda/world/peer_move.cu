// The collectives that only move bytes: all-gather, all-to-all, broadcast, and the bare barrier.
#include "cuda/world/peer_launch.h"

namespace pyparallel::cuda {
namespace {

using Byte = unsigned char;

__global__ void __launch_bounds__(kPeerThreads, 1)
    all_gather_kernel(const __grid_constant__ PeerCall call, Byte* output, const Byte* input,
                      const __grid_constant__ Split split) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) {
    all_gather(m, output, input,
               BlockCut(split, int(gridDim.x), int(blockIdx.x), kShareGrain<Byte>));
  });
}

__global__ void __launch_bounds__(kPeerThreads, 1)
    all_to_all_kernel(const __grid_constant__ PeerCall call, Byte* output, const Byte* input,
                      const __grid_constant__ Split output_split,
                      const __grid_constant__ Split input_split) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) {
    const int blocks = int(gridDim.x), block = int(blockIdx.x);
    all_to_all(m, output, input, BlockCut(output_split, blocks, block, kShareGrain<Byte>),
               BlockCut(input_split, blocks, block, kShareGrain<Byte>));
  });
}

__global__ void __launch_bounds__(kPeerThreads, 1)
    broadcast_kernel(const __grid_constant__ PeerCall call, Byte* data, int64_t bytes, int root) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) {
    const Part share = share_of<Byte>(bytes);
    broadcast(m, data + share.begin, share.size(), root);
  });
}

__global__ void __launch_bounds__(kWarp) barrier_kernel(const __grid_constant__ PeerCall call) {
  __shared__ World world;
  run_block(call, world, BlockLanes(), [&](DeviceMember& m) { barrier(m); });
}

}  // namespace

void peer_all_gather(const PeerCall& call, Byte* output, const Byte* input, const Split& split,
                     cudaStream_t stream) {
  const int blocks = peer_blocks(split.largest(call.peers.size));
  all_gather_kernel<<<blocks, kPeerThreads, 0, stream>>>(call, output, input, split);
  check_launch("peer_all_gather");
}

void peer_all_to_all(const PeerCall& call, Byte* output, const Byte* input,
                     const Split& output_split, const Split& input_split, cudaStream_t stream) {
  // Who sends how much is known to the sender alone, so the number of blocks may not depend on it.
  all_to_all_kernel<<<kPeerBlocks, kPeerThreads, 0, stream>>>(call, output, input, output_split,
                                                              input_split);
  check_launch("peer_all_to_all");
}

void peer_broadcast(const PeerCall& call, Byte* data, int64_t bytes, int root,
                    cudaStream_t stream) {
  broadcast_kernel<<<peer_blocks(bytes), kPeerThreads, 0, stream>>>(call, data, bytes, root);
  check_launch("peer_broadcast");
}

void peer_barrier(const PeerCall& call, cudaStream_t stream) {
  barrier_kernel<<<1, kWarp, 0, stream>>>(call);
  check_launch("peer_barrier");
}

}  // namespace pyparallel::cuda
