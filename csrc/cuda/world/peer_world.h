// The World of core/world.h over the memory of several GPUs: a kernel's view of it.
//
// Every rank owns one zeroed segment that all ranks can address (peer_group.h). It holds, for each
// of kPeerBlocks thread blocks, a control area and a data area, so block i of one rank talks to block i
// of the others and to nobody else. Epochs lie in this rank's own device memory: a captured graph that
// is replayed goes on where it stopped.
#pragma once

#include <cstddef>

#include "core/barrier.h"
#include "core/world.h"

namespace pyparallel::cuda {

// Blocks of the largest peer kernel, and ranks of the largest group: GPUs that share NVLink.
constexpr int kPeerBlocks = 32;
constexpr int kPeerThreads = 512;
constexpr int kMaxPeers = 16;

// What a kernel found wrong, in pinned host memory, read by the host after the fact. Zero: nothing.
struct PeerFault {
  uint64_t missing;   // bit r: rank r did not come within the timeout
  uint64_t mismatch;  // bit r: rank r made another call
  uint64_t sequence;  // of the first call that failed
};

// Passed to kernels by value.
struct PeerWorld {
  int rank;
  int size;
  int64_t slot_bytes;
  uint64_t timeout_ns;
  PeerFault* fault;
  uint32_t* epochs;  // [kPeerBlocks], this rank's own
  unsigned char* base[kMaxPeers];

  static PP_HOST_DEVICE int64_t block_bytes(int size, int64_t slot_bytes) {
    return round_up(World::control_bytes(size), kLine) + World::data_bytes(slot_bytes);
  }
  static PP_HOST_DEVICE int64_t segment_bytes(int size, int64_t slot_bytes) {
    return kPeerBlocks * block_bytes(size, slot_bytes);
  }
};

// Block `block`'s World; written by the lanes of that block into memory they share. There is no
// channel area: point-to-point messages between GPUs are NCCL's.
template <class Lanes>
PP_HOST_DEVICE void make_world(const Lanes& lanes, const PeerWorld& peers, int block,
                               World& world) {
  const int64_t offset = block * PeerWorld::block_bytes(peers.size, peers.slot_bytes);
  const int64_t control = round_up(World::control_bytes(peers.size), kLine);
  if (lanes.index() == 0) {
    world.rank = peers.rank;
    world.size = peers.size;
    world.slot_bytes = peers.slot_bytes;
    world.ring_bytes = 0;
  }
  for (int r = lanes.index(); r < peers.size; r += lanes.count()) {
    world.control[r] = peers.base[r] + offset;
    world.data[r] = peers.base[r] + offset + control;
  }
  lanes.sync();
}

// One block's share of a Split: every part is cut over the blocks, in units of `grain` elements.
struct BlockCut {
  const Split& whole;
  const int64_t* begin;
  int blocks;
  int block;
  int64_t grain;

  PP_HOST_DEVICE BlockCut(const Split& split, int of_blocks, int this_block, int64_t unit)
      : whole(split), begin(split.begin), blocks(of_blocks), block(this_block), grain(unit) {}

  PP_HOST_DEVICE Part operator[](int r) const {
    const Part share = part_of(whole[r].size(), blocks, block, grain);
    return {begin[r] + share.begin, begin[r] + share.end};
  }
  PP_HOST_DEVICE int64_t largest(int parts) const {
    int64_t most = 0;
    for (int r = 0; r < parts; ++r) most = max_of(most, (*this)[r].size());
    return most;
  }
};

// Elements a block's share is cut at, so that every share starts on a line.
template <class T>
constexpr int64_t kShareGrain = kLine / int64_t(sizeof(T));

}  // namespace pyparallel::cuda
