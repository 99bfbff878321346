// The kernels of this folder as host functions: pointers and a stream, no torch.
//
// All are instantiated for float, Half and BFloat16, run on `stream`, allocate nothing and do not
// synchronise, so they may be captured into a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kernels/bias_activation.h"
#include "cuda/kernels/column_sum.h"
#include "cuda/kernels/cross_entropy.h"
#include "cuda/kernels/layer_norm.h"
#include "cuda/kernels/rank_sum.h"
#include "cuda/kernels/rms_norm.h"

namespace pyparallel::cuda {

template <class T>
void rms_norm(const RmsNorm<T>& a, cudaStream_t stream);
template <class T>
void rms_norm_backward(const RmsNormBackward<T>& a, cudaStream_t stream);

template <class T>
void layer_norm(const LayerNorm<T>& a, cudaStream_t stream);
template <class T>
void layer_norm_backward(const LayerNormBackward<T>& a, cudaStream_t stream);

// Blocks of rows column_sum wants partials for; [blocks, N] fp32 each.
int64_t column_sum_blocks(int64_t rows, int64_t columns);
// dweight, dbias [N] of T; either may be null.
template <class T>
void column_sum(const ColumnSum<T>& a, T* dweight, T* dbias, cudaStream_t stream);

template <class T>
void bias_activation(const BiasActivation<T>& a, cudaStream_t stream);
template <class T>
void gated_activation(const GatedActivation<T>& a, cudaStream_t stream);

template <class T>
void cross_entropy_stats(const CrossEntropy<T>& a, float* stats, cudaStream_t stream);
template <class T>
void cross_entropy_gradient(const CrossEntropyGradient<T>& g, cudaStream_t stream);

template <class T>
void rank_sum(const RankSum<T>& a, cudaStream_t stream);

}  // namespace pyparallel::cuda

#define PP_INSTANTIATE_FLOATS(INSTANTIATE) \
  INSTANTIATE(float)                       \
  INSTANTIATE(::pyparallel::Half)          \
  INSTANTIATE(::pyparallel::BFloat16)
