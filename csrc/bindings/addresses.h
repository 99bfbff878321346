// What Python hands over: addresses, and a matrix as a tuple of them.
#pragma once

#include <cstdint>
#include <tuple>

#include "cpu/kernels/kernels.h"

namespace pyparallel {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (data, precision, bias, scale, rows); an address of 0 where there is none.
using WeightTuple = std::tuple<uintptr_t, int, uintptr_t, uintptr_t, int64_t>;

inline cpu::Weight weight_of(const WeightTuple& w) {
  const auto [data, precision, bias, scale, rows] = w;
  return {pointer<const void>(data), pointer<const float>(scale), pointer<const float>(bias),
          cpu::Precision(precision), rows};
}

}  // namespace pyparallel
