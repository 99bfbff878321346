// The kernels for processors with AVX2, FMA and F16C.
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
#pragma GCC target("avx2,fma,f16c")

namespace pyparallel::cpu {
namespace {
#include "cpu/simd/avx2.inl"

#include "cpu/kernels/kernel_bodies.inl"
}  // namespace

const Kernels& kernels_avx2() {
  static const Kernels table = kernel_table();
  return table;
}

}  // namespace pyparallel::cpu
#pragma GCC pop_options
#endif
