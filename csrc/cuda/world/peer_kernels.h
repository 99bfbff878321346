// The collectives of core/collective.h as stream-ordered kernels over peer memory.
//
// Every call is one kernel, allocates nothing and reads its epoch from device memory, so that it may be
// captured into a CUDA graph. Calls of one PeerWorld must be ordered, by one stream or by events.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/world/all_reduce_norm.h"
#include "cuda/world/peer_world.h"

namespace pyparallel::cuda {

enum class PeerOperation : uint32_t {
  all_reduce = 1,
  reduce_scatter,
  all_gather,
  all_to_all,
  broadcast,
  barrier,
  all_reduce_norm,
};
enum class Reduction : uint32_t { none = 0, sum, max, min };
// one_shot: one step, reads n. two_shot: two steps, reads 2 n (R-1)/R. The caller knows where the one
// gives way to the other (pyparallel/native/cuda/tuning.py), and all ranks must agree.
enum class Algorithm { one_shot = 1, two_shot };

// What one launch needs to know beside its data.
struct PeerCall {
  PeerWorld peers;
  Description description;
};

// Thread blocks a call of `bytes` uses; a function of the bytes alone, so that all ranks agree.
int peer_blocks(int64_t bytes);

template <class T>
void peer_all_reduce(const PeerCall& call, T* data, int64_t n, Reduction reduction,
                     Algorithm algorithm, cudaStream_t stream);
template <class T>
void peer_reduce_scatter(const PeerCall& call, T* output, const T* input, const Split& split,
                         Reduction reduction, cudaStream_t stream);
// Nothing is summed: counts in bytes.
void peer_all_gather(const PeerCall& call, unsigned char* output, const unsigned char* input,
                     const Split& split, cudaStream_t stream);
void peer_all_to_all(const PeerCall& call, unsigned char* output, const unsigned char* input,
                     const Split& output_split, const Split& input_split, cudaStream_t stream);
void peer_broadcast(const PeerCall& call, unsigned char* data, int64_t bytes, int root,
                    cudaStream_t stream);
void peer_barrier(const PeerCall& call, cudaStream_t stream);

// std::invalid_argument if a row of H elements does not fit into a slot.
template <class T>
void peer_all_reduce_norm(const PeerCall& call, const AllReduceNorm<T>& a, Algorithm algorithm,
                          cudaStream_t stream);

}  // namespace pyparallel::cuda
