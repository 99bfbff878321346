// Norms of dense rows, cut over the rows.
#pragma once

#include <cstdint>

namespace pyparallel::cpu {

// y [rows, n] = x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t n, float* y,
              int threads);

// y [rows, n] = (x - mean) / sqrt(var + eps) * weight + bias; bias may be null.
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows,
                int64_t n, float* y, int threads);

}  // namespace pyparallel::cpu
