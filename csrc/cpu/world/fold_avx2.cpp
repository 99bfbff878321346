// The folds in AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/world/fold.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace pyparallel::cpu {
namespace {
#include "cpu/simd/avx2.inl"

#include "cpu/world/fold.inl"
}  // namespace

const Folds& folds_avx2() { return kFolds; }

}  // namespace pyparallel::cpu
#pragma GCC pop_options
#endif
