// The folds in portable C++.
#include <cstdint>
#include <cstring>

#include "cpu/collectives_fold.h"
#include "cpu/isa.h"

namespace pyparallel::cpu {
namespace {

#include "cpu/simd_plain.h"

void stream(void* dst, const void* src, int64_t bytes) { std::memcpy(dst, src, size_t(bytes)); }

#include "cpu/collectives_fold_loops.h"

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
