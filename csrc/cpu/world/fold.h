// The rank-ordered fold (core/reduce.h) in SIMD, and copies that go past the caches. Same bits on
// every path: the order is that of the ranks, never that of the lanes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/pack.h"
#include "core/reduce.h"

namespace pyparallel::cpu {

// dst [n] = source[0] op ... op source[ranks - 1]; dst may be one of the sources.
template <class T>
using Fold = void (*)(T* dst, const T* const* source, int ranks, int64_t n);

template <class T>
struct FoldsOf {
  Fold<T> sum;
  Fold<T> max;
  Fold<T> min;
};

// All folds of one instruction set.
struct Folds {
  FoldsOf<float> float32;
  FoldsOf<Half> float16;
  FoldsOf<BFloat16> bfloat16;
  FoldsOf<double> float64;
  FoldsOf<int32_t> int32;
  FoldsOf<int64_t> int64;
  // A copy that goes past the caches.
  void (*stream)(void* dst, const void* src, int64_t bytes);

  template <class T>
  const FoldsOf<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return float32;
    else if constexpr (std::is_same_v<T, Half>)
      return float16;
    else if constexpr (std::is_same_v<T, BFloat16>)
      return bfloat16;
    else if constexpr (std::is_same_v<T, double>)
      return float64;
    else if constexpr (std::is_same_v<T, int32_t>)
      return int32;
    else
      return int64;
  }

  template <class Op, class T>
  Fold<T> get() const {
    if constexpr (std::is_same_v<Op, Sum>)
      return of<T>().sum;
    else if constexpr (std::is_same_v<Op, Max>)
      return of<T>().max;
    else
      return of<T>().min;
  }
};

// Those of the instruction set in use (cpu/simd/isa.h).
const Folds& folds();

const Folds& folds_plain();
#if defined(__x86_64__)
const Folds& folds_avx2();
const Folds& folds_avx512();
#endif

}  // namespace pyparallel::cpu
