// PYPARALLEL_BODY compiled for every instruction set, in namespaces of their names; see each_isa.h.
namespace plain {
#include "cpu/simd/plain.inl"

#include "cpu/simd/math.inl"
#include PYPARALLEL_BODY
}  // namespace plain

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "cpu/simd/avx2.inl"

#include "cpu/simd/math.inl"
#include PYPARALLEL_BODY
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
// GCC 12 reports its own intrinsics' deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
namespace avx512 {
#include "cpu/simd/avx512.inl"

#include "cpu/simd/math.inl"
#include PYPARALLEL_BODY
}  // namespace avx512
#pragma GCC pop_options
#else
namespace avx2 = plain;
namespace avx512 = plain;
#endif
