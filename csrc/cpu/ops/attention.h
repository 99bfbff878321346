// Causal attention over keys that lie in a cache, the last query at the last key.
#pragma once

#include <cstdint>

#include "cpu/kernels/kernels.h"

namespace pyparallel::cpu {

// out [B, S, N, D] = softmax(q k^T) v. q [B, S, N, D] fp32, scaled, dense; keys and values [B, Nk, T, D] with
// strides in elements. Query s stands at position start + s and sees itself and what is before it, at most
// `window` keys if that is not 0.
struct Attention {
  const float* q;
  int64_t B;
  int64_t S;
  int64_t N;
  int64_t D;
  const void* keys;
  const void* values;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t key_stride;
  Precision precision;
  int64_t Nk;
  int64_t start;
  int64_t window;
  float* out;
};

void attention(const Attention& a, int threads);

}  // namespace pyparallel::cpu
