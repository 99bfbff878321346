// The kernels for processors with AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/pack.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/thin_streams.h"

// Set after every shared header, so that no inline function of theirs is compiled for this set only.
#pragma GCC push_options
// GCC 12 reports its own intrinsics' deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

namespace pyparallel::cpu {
namespace {
#include "cpu/simd/avx512.inl"

#include "cpu/kernels/kernel_bodies.inl"
}  // namespace

const Kernels& kernels_avx512() {
  static const Kernels table = kernel_table();
  return table;
}

}  // namespace pyparallel::cpu
#pragma GCC pop_options
#endif
