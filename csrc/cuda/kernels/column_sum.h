// Gradients of what a row kernel shares between rows: sums over the rows of each column.
//
//   dweight[j] = sum over i of dy[i, j] * (x[i, j] - mean[i]) * rstd[i]
//   dbias[j]   = sum over i of dy[i, j]
//
// dy, x [M, N] contiguous; mean, rstd [M] fp32; either output may be null. Each lane owns W columns and walks its block's
// rows; block b of the rows writes partial[b], and the partials are added in order of b, in fp32: no
// atomics, the same bits every run.
#pragma once

#include "cuda/kernels/row_lanes.h"
#include "cuda/kernels/vec.h"

namespace pyparallel::cuda {

template <class T>
struct ColumnSum {
  const T* dy;
  const T* x;         // null: dweight is not asked for
  const float* mean;  // null: 0
  const float* rstd;
  float* dweight_partial;  // [blocks, N]
  float* dbias_partial;    // [blocks, N], or null
  int64_t rows;
  int64_t columns;
  int64_t blocks;
};

// Columns [vec * W, vec * W + W) over the rows of block `block`; one lane.
template <int W, class T>
PP_HOST_DEVICE void column_sum_partial(const ColumnSum<T>& a, int64_t block, int64_t vec) {
  const Part rows = part_of(a.rows, int(a.blocks), int(block));
  float dweight[W] = {}, dbias[W] = {};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float dy[W];
    load_vec(dy, a.dy + row * a.columns + vec * W);
    if (a.x != nullptr) {
      const float mean = a.mean != nullptr ? a.mean[row] : 0.0f;
      const float rstd = a.rstd[row];
      float x[W];
      load_vec(x, a.x + row * a.columns + vec * W);
#pragma unroll
      for (int i = 0; i < W; ++i) dweight[i] += dy[i] * ((x[i] - mean) * rstd);
    }
#pragma unroll
    for (int i = 0; i < W; ++i) dbias[i] += dy[i];
  }
  const int64_t at = block * a.columns + vec * W;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (a.x != nullptr) a.dweight_partial[at + i] = dweight[i];
    if (a.dbias_partial != nullptr) a.dbias_partial[at + i] = dbias[i];
  }
}

// out[column] = sum of partial[b, column] in order of b, rounded once; one lane.
template <class T>
PP_HOST_DEVICE void column_sum_finish(const float* partial, T* out, int64_t blocks, int64_t columns,
                                      int64_t column) {
  float total = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) total += partial[b * columns + column];
  out[column] = narrow<T>(total);
}

}  // namespace pyparallel::cuda
