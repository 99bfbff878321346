// What every peer kernel begins and ends with.
#pragma once

#include "core/collective.h"
#include "cuda/kernels/launch.h"
#include "cuda/world/device_waiter.h"
#include "cuda/world/peer_kernels.h"

namespace pyparallel::cuda {

using DeviceMember = Member<BlockLanes, DeviceWaiter>;

// Runs body(member) as block blockIdx.x of `call`, and keeps its epoch for the next launch.
// An epoch is kept also when the wait failed: the group is given up then.
template <class Lanes, class Body>
__device__ __forceinline__ void run_block(const PeerCall& call, World& world, const Lanes& lanes,
                                          Body body) {
  make_world(lanes, call.peers, int(blockIdx.x), world);
  DeviceWaiter waiter{call.peers.fault, call.description.sequence, call.peers.timeout_ns};
  Member<Lanes, DeviceWaiter> member{world,
                                     lanes,
                                     waiter,
                                     call.peers.epochs[blockIdx.x],
                                     signature_of(call.description),
                                     call.peers.slot_bytes,
                                     Store::cached};
  body(member);
  // All lanes have read the epoch above before one of them writes it.
  lanes.sync();
  if (lanes.index() == 0) call.peers.epochs[blockIdx.x] = member.epoch;
}

// This block's share of n elements.
template <class T>
__device__ __forceinline__ Part share_of(int64_t n) {
  return part_of(n, int(gridDim.x), int(blockIdx.x), kShareGrain<T>);
}

}  // namespace pyparallel::cuda
