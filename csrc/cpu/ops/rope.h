// The rotation of positions, in place, cut over the rows.
#pragma once

#include <cstdint>

namespace pyparallel::cpu {

// x [rows, heads, D]: the first `rotary` of each head are turned by cos, sin [rows, rotary / 2].
void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t D,
          int64_t rotary, int threads);

}  // namespace pyparallel::cpu
