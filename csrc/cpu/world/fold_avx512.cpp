// The folds in AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/world/fold.h"

#pragma GCC push_options
// GCC 12 reports its own intrinsics' deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

namespace pyparallel::cpu {
namespace {
#include "cpu/simd/avx512.inl"

#include "cpu/world/fold.inl"
}  // namespace

const Folds& folds_avx512() { return kFolds; }

}  // namespace pyparallel::cpu
#pragma GCC pop_options
#endif
