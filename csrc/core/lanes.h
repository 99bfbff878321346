// Who runs: the lanes that share one block's work. A CPU worker is a block of one lane; a GPU
// thread block has one lane a thread. The collectives ask a Lanes type for exactly this:
//
//   index(), count()                   which lane this is, of how many
//   sync()                             all lanes have come here and see each other's writes
//   all(ok)                            sync, and whether ok held on every lane
//   copy(dst, src, n, store)           n elements moved, shared over the lanes
//   fold<Op>(dst, source, R, n, store) dst[i] = Op over r = 0 .. R-1 of source(r)[i] (reduce.h)
//
// A backend may bring its own Lanes with faster copy and fold (SIMD on CPUs), never with another
// order of operations.
#pragma once

#include "core/pack.h"
#include "core/reduce.h"

namespace pyparallel {

// A hint: `streaming` stores go past the caches, for results that do not fit there.
enum class Store { cached, streaming };

// copy() shared over the lanes: packs where both sides are aligned, elements otherwise.
template <class T, class Lanes>
PP_HOST_DEVICE void copy_shared(const Lanes& lanes, T* dst, const T* src, int64_t n) {
  int64_t done = 0;
  if (is_pack_aligned(dst) && is_pack_aligned(src)) {
    const int64_t packs = n / Pack<T>::kSize;
    auto* to = reinterpret_cast<Pack<T>*>(dst);
    const auto* from = reinterpret_cast<const Pack<T>*>(src);
    for (int64_t i = lanes.index(); i < packs; i += lanes.count()) to[i] = from[i];
    done = packs * Pack<T>::kSize;
  }
  for (int64_t i = done + lanes.index(); i < n; i += lanes.count()) dst[i] = src[i];
}

// One CPU worker, in portable C++: the host truth of every collective.
struct SingleLane {
  PP_HOST_DEVICE int index() const { return 0; }
  PP_HOST_DEVICE int count() const { return 1; }
  PP_HOST_DEVICE void sync() const {}
  PP_HOST_DEVICE bool all(bool ok) const { return ok; }

  template <class T>
  PP_HOST_DEVICE void copy(T* dst, const T* src, int64_t n, Store) const {
    copy_shared(*this, dst, src, n);
  }
  template <class Op, class T, class Source>
  PP_HOST_DEVICE void fold(T* dst, const Source& source, int ranks, int64_t n, Store) const {
    fold_shared<Op>(*this, dst, source, ranks, n);
  }
};

#if defined(__CUDACC__)
// The threads of one block, a lane each. Only a kernel may make one.
struct BlockLanes {
  __device__ __forceinline__ int index() const { return int(threadIdx.x); }
  __device__ __forceinline__ int count() const { return int(blockDim.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool all(bool ok) const { return __syncthreads_and(ok); }

  template <class T>
  __device__ __forceinline__ void copy(T* dst, const T* src, int64_t n, Store) const {
    copy_shared(*this, dst, src, n);
  }
  template <class Op, class T, class Source>
  __device__ __forceinline__ void fold(T* dst, const Source& source, int ranks, int64_t n,
                                       Store) const {
    fold_shared<Op>(*this, dst, source, ranks, n);
  }
};
#endif

}  // namespace pyparallel
