// How a GPU block waits for its peers: bounded by the GPU's clock, and with a report to the host.
#pragma once

#include "core/barrier.h"
#include "cuda/world/peer_world.h"

namespace pyparallel::cuda {

#if defined(__CUDACC__)
// See Member in core/barrier.h. A kernel cannot throw: a wait that fails records why in the fault words,
// the block leaves the collective, and the host raises PeerError before it enqueues anything more.
struct DeviceWaiter {
  PeerFault* fault;
  uint64_t sequence;
  uint64_t timeout_ns;
  uint64_t started = 0;

  __device__ void begin(uint32_t) { started = now(); }

  __device__ bool again(int peer) {
    // Once a call has failed, everything behind it on the stream gives up at once.
    if (now() - started < timeout_ns && load_relaxed(&fault->sequence) == 0) {
      __nanosleep(20);
      return true;
    }
    record(&fault->missing, peer);
    return false;
  }
  __device__ bool mismatch(int peer) {
    record(&fault->mismatch, peer);
    return false;
  }
  __device__ bool miscounted(int peer, int64_t, int64_t) { return mismatch(peer); }

 private:
  static __device__ uint64_t now() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
  }
  // Only of the first call that fails: those behind it fail because of it, and would hide why.
  __device__ void record(uint64_t* word, int peer) {
    const uint64_t failed = load_relaxed(&fault->sequence);
    if (failed != 0 && failed != sequence) return;
    atomicOr_system(reinterpret_cast<unsigned long long*>(word), 1ull << peer);
    atomicCAS_system(reinterpret_cast<unsigned long long*>(&fault->sequence), 0ull,
                     static_cast<unsigned long long>(sequence));
  }
};
#endif

}  // namespace pyparallel::cuda
