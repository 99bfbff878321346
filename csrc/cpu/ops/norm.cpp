#include "cpu/ops/norm.h"

#include "cpu/kernels/kernels.h"
#include "cpu/ops/pool.h"

namespace pyparallel::cpu {

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t n, float* y,
              int threads) {
  const Kernels& k = kernels();
  for_each_row(rows, n, threads,
               [&](int64_t m) { k.rms_norm(x + m * n, weight, eps, n, y + m * n); });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows,
                int64_t n, float* y, int threads) {
  const Kernels& k = kernels();
  for_each_row(rows, n, threads,
               [&](int64_t m) { k.layer_norm(x + m * n, weight, bias, eps, n, y + m * n); });
}

}  // namespace pyparallel::cpu
