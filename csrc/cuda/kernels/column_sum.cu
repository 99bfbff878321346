#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.h"

namespace pyparallel::cuda {
namespace {

template <int W, class T>
__global__ void __launch_bounds__(kElementThreads)
    column_sum_partial_kernel(const __grid_constant__ ColumnSum<T> a) {
  const int64_t vec = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (vec < a.columns / W) column_sum_partial<W>(a, blockIdx.y, vec);
}

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    column_sum_finish_kernel(const float* partial, T* out, int64_t blocks, int64_t columns) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column < columns) column_sum_finish(partial, out, blocks, columns, column);
}

}  // namespace

// Enough blocks to fill any GPU (about 1000 in all) with at least 16 rows each: a function of the shape
// alone, so that the order of the sum, and with it the bits, are the same on every device.
int64_t column_sum_blocks(int64_t rows, int64_t columns) {
  const int64_t across = ceil_div(max_of(columns, 1), kElementThreads * 8);
  return max_of(1, min_of(ceil_div(rows, 16), ceil_div(1024, across)));
}

template <class T>
void column_sum(const ColumnSum<T>& a, T* dweight, T* dbias, cudaStream_t stream) {
  if (a.columns == 0) return;
  const bool wide = is_vectorizable(a.dy, a.columns) && is_vectorizable(a.x, a.columns);
  with_width<T>(wide, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const dim3 grid(blocks_of(a.columns / W, kElementThreads), unsigned(a.blocks));
    column_sum_partial_kernel<W><<<grid, kElementThreads, 0, stream>>>(a);
  });
  check_launch("column_sum_partial");
  const unsigned blocks = blocks_of(a.columns, kElementThreads);
  const auto finish = [&](const float* partial, T* out) {
    column_sum_finish_kernel<<<blocks, kElementThreads, 0, stream>>>(partial, out, a.blocks,
                                                                     a.columns);
    check_launch("column_sum_finish");
  };
  if (dweight != nullptr) finish(a.dweight_partial, dweight);
  if (dbias != nullptr) finish(a.dbias_partial, dbias);
}

#define INSTANTIATE(T) template void column_sum<T>(const ColumnSum<T>&, T*, T*, cudaStream_t);
PP_INSTANTIATE_FLOATS(INSTANTIATE)

}  // namespace pyparallel::cuda
