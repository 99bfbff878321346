// The folds in portable C++.
#include <cstdint>
#include <cstring>

#include "cpu/world/fold.h"
#include "cpu/simd/isa.h"

namespace pyparallel::cpu {
namespace {

#include "cpu/simd/plain.inl"

void stream(void* dst, const void* src, int64_t bytes) { std::memcpy(dst, src, size_t(bytes)); }

#include "cpu/world/fold.inl"

}  // namespace

const Folds& folds_plain() { return kFolds; }

const Folds& folds() {
  switch (isa_in_use().load(std::memory_order_relaxed)) {
    case Isa::plain: return folds_plain();
    case Isa::avx2: return folds_avx2();
    default: return folds_avx512();
  }
}

}  // namespace pyparallel::cpu
