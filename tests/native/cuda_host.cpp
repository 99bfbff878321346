// The kernel bodies of csrc/cuda as a C library, for tests/native/test_cuda_host_kernels.py: each entry runs a
// body on the host as `lanes` threads of one block, over the rows of a tensor.
//
// dtype: 0 float, 1 half, 2 bfloat16. wide: 1 for 16-byte accesses, 0 for single elements.
#include "cuda/kernels/bias_activation.h"
#include "cuda/kernels/column_sum.h"
#include "cuda/kernels/cross_entropy.h"
#include "cuda/kernels/layer_norm.h"
#include "cuda/kernels/rank_sum.h"
#include "cuda/kernels/rms_norm.h"
#include "cuda/kernels/softcap.h"
#include "host_block.h"

using namespace pyparallel;
using namespace pyparallel::cuda;

namespace {

// Calls body(T{}, width).
template <class Body>
void dispatch(int dtype, int wide, Body body) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    if (wide) {
      body(zero, std::integral_constant<int, kVecWidth<T>>{});
    } else {
      body(zero, std::integral_constant<int, 1>{});
    }
  };
  switch (dtype) {
    case 0: return typed(float{});
    case 1: return typed(Half{});
    default: return typed(BFloat16{});
  }
}

// body(lanes, row) for every row, in one block; a single lane runs without threads.
template <class Body>
void for_rows(int lanes, int64_t rows, Body body) {
  if (lanes == 1) {
    for (int64_t row = 0; row < rows; ++row) body(SingleRowLane(), row);
    return;
  }
  test::run_lanes(lanes, [&](const test::ThreadRowLanes& mine) {
    for (int64_t row = 0; row < rows; ++row) body(mine, row);
  });
}

template <class T>
T* as(void* address) {
  return static_cast<T*>(address);
}

}  // namespace

extern "C" {

void host_rms_norm(int dtype, int wide, int lanes, void* x, void* residual, void* weight, void* y,
                   void* summed, float* rstd, int64_t rows, int64_t hidden, float eps) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const RmsNorm<T> a{
        as<T>(x), as<T>(residual), as<T>(weight), as<T>(y), as<T>(summed), rstd, rows, hidden, eps};
    for_rows(lanes, rows, [&](const auto& l, int64_t row) { rms_norm_row<width>(l, a, row); });
  });
}

void host_rms_norm_backward(int dtype, int wide, int lanes, void* dy, void* h, void* weight,
                            float* rstd, void* dx, int64_t rows, int64_t hidden) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const RmsNormBackward<T> a{as<T>(dy), as<T>(h), as<T>(weight), rstd, as<T>(dx), rows, hidden};
    for_rows(lanes, rows,
             [&](const auto& l, int64_t row) { rms_norm_backward_row<width>(l, a, row); });
  });
}

void host_layer_norm(int dtype, int wide, int lanes, void* x, void* weight, void* bias, void* y,
                     float* mean, float* rstd, int64_t rows, int64_t hidden, float eps) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const LayerNorm<T> a{as<T>(x), as<T>(weight), as<T>(bias), as<T>(y), mean,
                         rstd,     rows,          hidden,      eps};
    for_rows(lanes, rows, [&](const auto& l, int64_t row) { layer_norm_row<width>(l, a, row); });
  });
}

void host_layer_norm_backward(int dtype, int wide, int lanes, void* dy, void* x, void* weight,
                              float* mean, float* rstd, void* dx, int64_t rows, int64_t hidden) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const LayerNormBackward<T> a{as<T>(dy), as<T>(x),  as<T>(weight), mean,
                                 rstd,      as<T>(dx), rows,          hidden};
    for_rows(lanes, rows,
             [&](const auto& l, int64_t row) { layer_norm_backward_row<width>(l, a, row); });
  });
}

void host_column_sum(int dtype, int wide, int64_t blocks, void* dy, void* x, float* mean,
                     float* rstd, float* partial, void* dweight, void* dbias, int64_t rows,
                     int64_t columns) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const ColumnSum<T> a{as<T>(dy), as<T>(x), mean,  rstd, partial, partial + blocks * columns,
                         rows,      columns,  blocks};
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t vec = 0; vec < columns / width; ++vec) column_sum_partial<width>(a, block, vec);
    }
    for (int64_t column = 0; column < columns; ++column) {
      column_sum_finish(a.dweight_partial, as<T>(dweight), blocks, columns, column);
      column_sum_finish(a.dbias_partial, as<T>(dbias), blocks, columns, column);
    }
  });
}

void host_bias_activation(int dtype, int wide, void* x, void* bias, void* dy, void* y, int64_t rows,
                          int64_t columns, int64_t stride, int kind) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const BiasActivation<T> a{as<T>(x), as<T>(bias), as<T>(y), as<T>(dy),
                              rows,     columns,     stride,   Activation(kind)};
    for (int64_t at = 0; at < rows * (columns / width); ++at) bias_activation_vec<width>(a, at);
  });
}

void host_softcap(int dtype, int wide, void* x, void* dy, void* y, int64_t n, float cap) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const Softcap<T> a{as<T>(x), as<T>(dy), as<T>(y), n, cap};
    for (int64_t at = 0; at < ceil_div(n, int64_t(width)); ++at) softcap_vec<width>(a, at);
  });
}

void host_gated_activation(int dtype, int wide, void* gate, void* up, void* gate_bias,
                           void* up_bias, void* dy, void* y, void* dgate, void* dup, int64_t rows,
                           int64_t columns, int64_t in_stride, int64_t out_stride, int kind) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const GatedActivation<T> a{
        as<T>(gate), as<T>(up),    as<T>(gate_bias), as<T>(up_bias), as<T>(dy),
        as<T>(y),    as<T>(dgate), as<T>(dup),       rows,           columns,
        in_stride,   out_stride,   Activation(kind)};
    for (int64_t at = 0; at < rows * (columns / width); ++at) gated_activation_vec<width>(a, at);
  });
}

void host_cross_entropy_stats(int dtype, int wide, int lanes, void* logits, int64_t* targets,
                              float* stats, int64_t rows, int64_t columns, int64_t stride,
                              int64_t offset, int64_t ignored) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const CrossEntropy<T> a{as<T>(logits), targets, rows, columns, stride, offset, ignored};
    for_rows(lanes, rows,
             [&](const auto& l, int64_t row) { cross_entropy_stats_row<width>(l, a, stats, row); });
  });
}

void host_cross_entropy_gradient(int dtype, int wide, int lanes, void* logits, int64_t* targets,
                                 float* lse, float* dloss, int64_t rows, int64_t columns,
                                 int64_t stride, int64_t offset, int64_t ignored, float on_target,
                                 float off_target, float z_loss, float* base) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const CrossEntropy<T> a{as<T>(logits), targets, rows, columns, stride, offset, ignored};
    const CrossEntropyGradient<T> g{a,         lse,        dloss,  as<T>(logits), stride,
                                    on_target, off_target, z_loss, base};
    for_rows(lanes, rows,
             [&](const auto& l, int64_t row) { cross_entropy_gradient_row<width>(l, g, row); });
  });
}

void host_rank_sum(int dtype, int wide, void* parts, void* bias, void* residual, void* out,
                   int ranks, int64_t rank_stride, int64_t rows, int64_t columns) {
  dispatch(dtype, wide, [&](auto zero, auto width) {
    using T = decltype(zero);
    const RankSum<T> a{as<T>(parts), as<T>(bias), as<T>(residual), as<T>(out), ranks,
                       rank_stride,  rows,        columns};
    for (int64_t at = 0; at < rows * columns / width; ++at) rank_sum_vec<width>(a, at);
  });
}

}  // extern "C"
