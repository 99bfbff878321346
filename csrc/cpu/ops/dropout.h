// Dropout whose mask is a function of the element's place: the first word of Philox4x32-10, keyed by
// the seed and counted by the place. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "cpu/world/types.h"

namespace pyparallel::cpu {

// out[i] = x[i] * scale where word(first + i, seed) < threshold, else 0; out may be x. The product is
// taken in fp32 and rounded once.
// Throws std::invalid_argument unless dtype is float32, bfloat16 or float16.
void dropout(const void* x, void* out, DType dtype, int64_t n, uint64_t first, uint64_t seed,
             uint64_t threshold, float scale);

}  // namespace pyparallel::cpu
