// Norms as torch ops. Shapes, equations and rounding: rms_norm.h, layer_norm.h, column_sum.h.
#include "cuda/bindings/tensor_arguments.h"
#include "cuda/kernels/kernels.h"

namespace pyparallel::cuda {
namespace {

// -> y, rstd
std::tuple<Tensor, Tensor> op_rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_contiguous("x", x, rows, hidden);
  check_vector("weight", weight, hidden);
  check_dtype("weight", weight, x.scalar_type());
  OnDeviceOf device(x);
  Tensor y = empty_like_rows(x, rows, hidden);
  Tensor rstd = empty_vector(x, rows, ScalarType::Float);
  dispatch_floats("x", x, [&](auto zero) {
    using T = decltype(zero);
    rms_norm<T>({data_of<T>(x), nullptr, data_of<T>(weight), data_of<T>(y), nullptr,
                 data_of<float>(rstd), rows, hidden, float(eps)},
                device.stream());
  });
  return {y, rstd};
}

// -> y, x + residual, rstd
std::tuple<Tensor, Tensor, Tensor> op_add_rms_norm(Tensor x, Tensor residual, Tensor weight,
                                                   double eps) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_contiguous("x", x, rows, hidden);
  check_contiguous("residual", residual, rows, hidden);
  check_vector("weight", weight, hidden);
  check_dtype("residual", residual, x.scalar_type());
  check_dtype("weight", weight, x.scalar_type());
  OnDeviceOf device(x);
  Tensor y = empty_like_rows(x, rows, hidden);
  Tensor summed = empty_like_rows(x, rows, hidden);
  Tensor rstd = empty_vector(x, rows, ScalarType::Float);
  dispatch_floats("x", x, [&](auto zero) {
    using T = decltype(zero);
    rms_norm<T>({data_of<T>(x), data_of<T>(residual), data_of<T>(weight), data_of<T>(y),
                 data_of<T>(summed), data_of<float>(rstd), rows, hidden, float(eps)},
                device.stream());
  });
  return {y, summed, rstd};
}

// dweight (and dbias) by column sums; mean is null for RMS norm.
template <class T>
void parameter_gradients(const Tensor& dy, const Tensor& x, const float* mean, const float* rstd,
                         Tensor& dweight, Tensor* dbias, cudaStream_t stream) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  const int64_t blocks = column_sum_blocks(rows, hidden);
  Tensor partial = empty_vector(dy, 2 * blocks * hidden, ScalarType::Float);
  float* base = data_of<float>(partial);
  column_sum<T>({data_of<T>(dy), data_of<T>(x), mean, rstd, base,
                 dbias == nullptr ? nullptr : base + blocks * hidden, rows, hidden, blocks},
                data_of<T>(dweight), dbias == nullptr ? nullptr : data_of<T>(*dbias), stream);
}

// -> dx, dweight
std::tuple<Tensor, Tensor> op_rms_norm_backward(Tensor dy, Tensor h, Tensor weight, Tensor rstd) {
  const int64_t rows = h.size(0), hidden = h.size(1);
  check_contiguous("dy", dy, rows, hidden);
  check_contiguous("h", h, rows, hidden);
  check_vector("weight", weight, hidden);
  check_vector("rstd", rstd, rows);
  check_dtype("h", h, dy.scalar_type());
  check_dtype("weight", weight, dy.scalar_type());
  check_dtype("rstd", rstd, ScalarType::Float);
  OnDeviceOf device(dy);
  Tensor dx = empty_like_rows(dy, rows, hidden);
  Tensor dweight = empty_vector(dy, hidden, std::nullopt);
  dispatch_floats("dy", dy, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_backward<T>({data_of<T>(dy), data_of<T>(h), data_of<T>(weight), data_of<float>(rstd),
                          data_of<T>(dx), rows, hidden},
                         device.stream());
    parameter_gradients<T>(dy, h, nullptr, data_of<float>(rstd), dweight, nullptr, device.stream());
  });
  return {dx, dweight};
}

// -> y, mean, rstd
std::tuple<Tensor, Tensor, Tensor> op_layer_norm(Tensor x, Tensor weight, OptionalTensor bias,
                                                 double eps) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_contiguous("x", x, rows, hidden);
  check_vector("weight", weight, hidden);
  check_dtype("weight", weight, x.scalar_type());
  OnDeviceOf device(x);
  Tensor y = empty_like_rows(x, rows, hidden);
  Tensor mean = empty_vector(x, rows, ScalarType::Float);
  Tensor rstd = empty_vector(x, rows, ScalarType::Float);
  dispatch_floats("x", x, [&](auto zero) {
    using T = decltype(zero);
    layer_norm<T>({data_of<T>(x), data_of<T>(weight),
                   optional_vector<T>("bias", bias, hidden, x.scalar_type()), data_of<T>(y),
                   data_of<float>(mean), data_of<float>(rstd), rows, hidden, float(eps)},
                  device.stream());
  });
  return {y, mean, rstd};
}

// -> dx, dweight, dbias
std::tuple<Tensor, Tensor, Tensor> op_layer_norm_backward(Tensor dy, Tensor x, Tensor weight,
                                                          Tensor mean, Tensor rstd) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_contiguous("dy", dy, rows, hidden);
  check_contiguous("x", x, rows, hidden);
  check_vector("weight", weight, hidden);
  check_vector("mean", mean, rows);
  check_vector("rstd", rstd, rows);
  check_dtype("x", x, dy.scalar_type());
  check_dtype("weight", weight, dy.scalar_type());
  check_dtype("mean", mean, ScalarType::Float);
  check_dtype("rstd", rstd, ScalarType::Float);
  OnDeviceOf device(dy);
  Tensor dx = empty_like_rows(dy, rows, hidden);
  Tensor dweight = empty_vector(dy, hidden, std::nullopt);
  Tensor dbias = empty_vector(dy, hidden, std::nullopt);
  dispatch_floats("dy", dy, [&](auto zero) {
    using T = decltype(zero);
    layer_norm_backward<T>({data_of<T>(dy), data_of<T>(x), data_of<T>(weight), data_of<float>(mean),
                            data_of<float>(rstd), data_of<T>(dx), rows, hidden},
                           device.stream());
    parameter_gradients<T>(dy, x, data_of<float>(mean), data_of<float>(rstd), dweight, &dbias,
                           device.stream());
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyparallel, m) {
  m.def("cuda_rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "cuda_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_rms_norm_backward(Tensor dy, Tensor h, Tensor weight, Tensor rstd)"
      " -> (Tensor, Tensor)");
  m.def(
      "cuda_layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyparallel, CUDA, m) {
  m.impl("cuda_rms_norm", TORCH_BOX(&op_rms_norm));
  m.impl("cuda_add_rms_norm", TORCH_BOX(&op_add_rms_norm));
  m.impl("cuda_rms_norm_backward", TORCH_BOX(&op_rms_norm_backward));
  m.impl("cuda_layer_norm", TORCH_BOX(&op_layer_norm));
  m.impl("cuda_layer_norm_backward", TORCH_BOX(&op_layer_norm_backward));
}

}  // namespace pyparallel::cuda
