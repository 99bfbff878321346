// Lanes that share a row and reduce over it. Beside what core/lanes.h asks for:
//
//   sum(v), max(v)    over all lanes of the block, in a fixed order; every lane gets the result
//
// A host block is one lane (SingleRowLane); the tests also run the bodies on many host threads.
#pragma once

#include "core/lanes.h"

namespace pyparallel::cuda {

struct SingleRowLane : SingleLane {
  PP_HOST_DEVICE float sum(float value) const { return value; }
  PP_HOST_DEVICE float max(float value) const { return value; }
};

#if defined(__CUDACC__)
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// The threads of a block; `scratch` is shared memory for one float a warp.
struct BlockRowLanes : BlockLanes {
  float* scratch;

  __device__ __forceinline__ explicit BlockRowLanes(float* shared) : scratch(shared) {}

  __device__ __forceinline__ float sum(float value) const {
    return reduce(value, 0.0f, [](float a, float b) { return a + b; });
  }
  __device__ __forceinline__ float max(float value) const {
    return reduce(value, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  template <class Op>
  __device__ __forceinline__ float reduce(float value, float neutral, Op op) const {
    value = over_warp(value, op);
    // The scratch of an earlier reduction may still be in use by a slower warp.
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    const int warps = int(blockDim.x) / kWarp;
    const int lane = int(threadIdx.x) % kWarp;
    return over_warp(lane < warps ? scratch[lane] : neutral, op);
  }

  // Butterfly: every lane adds the same pairs in the same tree, so all get the same bits.
  template <class Op>
  static __device__ __forceinline__ float over_warp(float value, Op op) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      value = op(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
  }
};
#endif

}  // namespace pyparallel::cuda
