// W neighbouring elements of a row as fp32: how the row kernels read and write memory.
//
// W is 16 / sizeof(T), one 128-bit access, where every row starts on 16 bytes, and 1 otherwise.
#pragma once

#include "core/pack.h"

namespace pyparallel::cuda {

template <class T, int W>
struct alignas(sizeof(T) * W) Vec {
  T at[W];
};

template <class T>
constexpr int kVecWidth = kPackBytes / int(sizeof(T));

template <int W, class T>
PP_HOST_DEVICE void load_vec(float (&value)[W], const T* from) {
  const auto vec = *reinterpret_cast<const Vec<T, W>*>(from);
#pragma unroll
  for (int i = 0; i < W; ++i) value[i] = widen(vec.at[i]);
}

// Rounds each element once, to nearest even.
template <int W, class T>
PP_HOST_DEVICE void store_vec(T* to, const float (&value)[W]) {
  Vec<T, W> vec;
#pragma unroll
  for (int i = 0; i < W; ++i) vec.at[i] = narrow<T>(value[i]);
  *reinterpret_cast<Vec<T, W>*>(to) = vec;
}

// Whether rows of `stride` elements from `base` all start on a pack boundary.
template <class T>
bool is_vectorizable(const T* base, int64_t stride) {
  return is_pack_aligned(base) && stride % kVecWidth<T> == 0;
}

}  // namespace pyparallel::cuda
