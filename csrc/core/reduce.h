// The rank-ordered fold: dst[i] = round(source(0)[i] op source(1)[i] op ... op source(R-1)[i]).
//
// Always from rank 0 upwards, carried in Accumulator<T> and rounded once, so that every rank and
// every run gets the same bits, whatever the algorithm around it.
#pragma once

#include "core/pack.h"

namespace pyparallel {

struct Sum {
  template <class A>
  static PP_HOST_DEVICE A apply(A a, A b) {
    return a + b;
  }
};

// Max and Min keep a NaN from either side; of equal values the higher rank's is taken.
struct Max {
  template <class A>
  static PP_HOST_DEVICE A apply(A a, A b) {
    return (a > b || a != a) ? a : b;
  }
};

struct Min {
  template <class A>
  static PP_HOST_DEVICE A apply(A a, A b) {
    return (a < b || a != a) ? a : b;
  }
};

// `source(r)` gives the address of rank r's elements.
template <class Op, class T, class Source>
PP_HOST_DEVICE T fold_element(const Source& source, int ranks, int64_t i) {
  Accumulator<T> total = widen(source(0)[i]);
  for (int r = 1; r < ranks; ++r) total = Op::apply(total, Accumulator<T>(widen(source(r)[i])));
  return narrow<T>(total);
}

template <class Op, class T, class Source>
PP_HOST_DEVICE Pack<T> fold_pack(const Source& source, int ranks, int64_t pack) {
  constexpr int kSize = Pack<T>::kSize;
  Accumulator<T> total[kSize];
  const Pack<T> first = reinterpret_cast<const Pack<T>*>(source(0))[pack];
  PP_UNROLL
  for (int k = 0; k < kSize; ++k) total[k] = widen(first.at[k]);
  for (int r = 1; r < ranks; ++r) {
    const Pack<T> next = reinterpret_cast<const Pack<T>*>(source(r))[pack];
    PP_UNROLL
    for (int k = 0; k < kSize; ++k) {
      total[k] = Op::apply(total[k], Accumulator<T>(widen(next.at[k])));
    }
  }
  Pack<T> result;
  PP_UNROLL
  for (int k = 0; k < kSize; ++k) result.at[k] = narrow<T>(total[k]);
  return result;
}

// The fold shared over a block's lanes. dst may be one of the sources: each element is read from
// all ranks before it is written, by the same lane.
template <class Op, class T, class Source, class Lanes>
PP_HOST_DEVICE void fold_shared(const Lanes& lanes, T* dst, const Source& source, int ranks,
                                int64_t n) {
  bool aligned = is_pack_aligned(dst);
  for (int r = 0; r < ranks; ++r) aligned = aligned && is_pack_aligned(source(r));
  int64_t done = 0;
  if (aligned) {
    const int64_t packs = n / Pack<T>::kSize;
    for (int64_t i = lanes.index(); i < packs; i += lanes.count()) {
      reinterpret_cast<Pack<T>*>(dst)[i] = fold_pack<Op, T>(source, ranks, i);
    }
    done = packs * Pack<T>::kSize;
  }
  for (int64_t i = done + lanes.index(); i < n; i += lanes.count()) {
    dst[i] = fold_element<Op, T>(source, ranks, i);
  }
}

}  // namespace pyparallel
