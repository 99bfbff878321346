// An op with kernels of its own, outside the table of cpu/kernels/kernels.h: it writes their bodies once,
// against Vec, and this compiles them for each instruction set. In the op's file, inside its own
// unnamed namespace:
//
//   #define PYPARALLEL_BODY "cpu/kernels/softcap.inl"
//   #include "cpu/simd/each_isa.inl"
//   ...
//   of_isa(plain::softcap, avx2::softcap, avx512::softcap)(arguments);
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "core/pack.h"
#include "cpu/simd/isa.h"

namespace pyparallel::cpu {

// The one for the instruction set in use.
template <class F>
F* of_isa(F* plain, F* avx2, F* avx512) {
  const Isa isa = isa_in_use().load(std::memory_order_relaxed);
  return isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : plain;
}

}  // namespace pyparallel::cpu
