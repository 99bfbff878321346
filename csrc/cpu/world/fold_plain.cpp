// The folds in portable C++, and the choice among all.
#include <cstdint>
#include <cstring>

#include "cpu/simd/isa.h"
#include "cpu/world/fold.h"

namespace pyparallel::cpu {
namespace {
#include "cpu/simd/plain.inl"

#include "cpu/world/fold.inl"
}  // namespace

const Folds& folds_plain() { return kFolds; }

const Folds& folds() {
#if defined(__x86_64__)
  switch (isa_in_use().load(std::memory_order_relaxed)) {
    case Isa::avx512_bf16:
    case Isa::avx512: return folds_avx512();
    case Isa::avx2: return folds_avx2();
    default: break;
  }
#endif
  return folds_plain();
}

}  // namespace pyparallel::cpu
