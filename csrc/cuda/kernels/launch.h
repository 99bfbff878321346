// How kernels are launched: errors as exceptions, sizes of grids, the width of accesses.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels/row.h"

namespace pyparallel::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // Clears a sticky launch error, so that the next call does not report this one again.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// At most 512, so that a thread may use 128 registers: a kept row is 32 of them. The kernels are bound
// to one block a multiprocessor at least, since for more ptxas would spill.
constexpr int kRowThreads = 512;
constexpr int kElementThreads = 256;

// Threads of a block that walks one row of `vecs`: enough to keep it in registers, whole warps.
inline int row_threads(int64_t vecs) {
  const int64_t wanted = ceil_div(vecs, kKeptVecs);
  return int(min_of(kRowThreads, max_of(32, round_up(wanted, 32))));
}

inline unsigned blocks_of(int64_t items, int threads) { return unsigned(ceil_div(items, threads)); }

// Calls body(std::integral_constant<int, W>) with the 16-byte width if `wide`, else with 1.
template <class T, class Body>
void with_width(bool wide, Body body) {
  if (wide) {
    body(std::integral_constant<int, kVecWidth<T>>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace pyparallel::cuda
