// The lanes of a CPU rank: one worker, whose copies and folds are SIMD.
#pragma once

#include <cstring>

#include "core/lanes.h"
#include "cpu/world/fold.h"

namespace pyparallel::cpu {

struct SimdLanes : SingleLane {
  const Folds* table = &folds();

  template <class T>
  void copy(T* dst, const T* src, int64_t n, Store store) const {
    const int64_t bytes = n * int64_t(sizeof(T));
    if (store == Store::streaming) {
      table->stream(dst, src, bytes);
    } else if (bytes > 0) {
      std::memcpy(dst, src, size_t(bytes));
    }
  }

  template <class Op, class T, class Source>
  void fold(T* dst, const Source& source, int ranks, int64_t n, Store store) const {
    const Fold<T> fold = table->get<Op, T>();
    const T* at[kMaxRanks];
    for (int r = 0; r < ranks; ++r) at[r] = source(r);
    if (store != Store::streaming) {
      fold(dst, at, ranks, n);
      return;
    }
    // A block is folded into the first-level cache and streamed from there.
    constexpr int64_t kBlock = 8192 / int64_t(sizeof(T));
    alignas(64) T block[kBlock];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t length = min_of(kBlock, n - begin);
      fold(block, at, ranks, length);
      table->stream(dst + begin, block, length * int64_t(sizeof(T)));
      for (int r = 0; r < ranks; ++r) at[r] += length;
    }
  }
};

}  // namespace pyparallel::cpu
