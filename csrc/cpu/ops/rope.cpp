#include "cpu/ops/rope.h"

#include "cpu/kernels/kernels.h"
#include "cpu/ops/pool.h"

namespace pyparallel::cpu {

void rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t D,
          int64_t rotary, int threads) {
  const Kernels& k = kernels();
  const int64_t half = rotary / 2;
  for_each_row(rows, heads * D, threads, [&](int64_t m) {
    for (int64_t h = 0; h < heads; ++h)
      k.rope(x + (m * heads + h) * D, cos + m * half, sin + m * half, rotary);
  });
}

}  // namespace pyparallel::cpu
