// Bias and activations as torch ops. Equations: bias_activation.h; codes: core/activation.h.
#include "cuda/bindings/tensor_arguments.h"
#include "cuda/kernels/kernels.h"

namespace pyparallel::cuda {
namespace {

Activation activation_of(int64_t code) {
  if (code < 0 || code >= kActivations) {
    fail("activation", "a code of 0 to " + std::to_string(kActivations - 1), std::to_string(code));
  }
  return Activation(code);
}

Tensor bias_activation_op(const Tensor& x, const OptionalTensor& bias, const Tensor* dy,
                          int64_t activation) {
  const int64_t rows = x.size(0), columns = x.size(1);
  check_matrix("x", x, rows, columns);
  if (dy != nullptr) {
    check_contiguous("dy", *dy, rows, columns);
    check_dtype("dy", *dy, x.scalar_type());
  }
  const Activation kind = activation_of(activation);
  OnDeviceOf device(x);
  Tensor y = empty_like_rows(x, rows, columns);
  dispatch_floats("x", x, [&](auto zero) {
    using T = decltype(zero);
    bias_activation<T>(
        {data_of<T>(x), optional_vector<T>("bias", bias, columns, x.scalar_type()), data_of<T>(y),
         dy == nullptr ? nullptr : data_of<const T>(*dy), rows, columns, x.stride(0), kind},
        device.stream());
  });
  return y;
}

Tensor op_bias_activation(Tensor x, OptionalTensor bias, int64_t activation) {
  return bias_activation_op(x, bias, nullptr, activation);
}

Tensor op_bias_activation_backward(Tensor dy, Tensor x, OptionalTensor bias, int64_t activation) {
  return bias_activation_op(x, bias, &dy, activation);
}

void check_gated(const Tensor& gate, const Tensor& up) {
  check_matrix("gate", gate, gate.size(0), gate.size(1));
  check_matrix("up", up, gate.size(0), gate.size(1));
  check_dtype("up", up, gate.scalar_type());
  if (gate.stride(0) != up.stride(0)) {
    fail("up", "the row stride of gate, " + std::to_string(gate.stride(0)),
         std::to_string(up.stride(0)));
  }
}

Tensor op_gated_activation(Tensor gate, Tensor up, OptionalTensor gate_bias, OptionalTensor up_bias,
                           int64_t activation) {
  check_gated(gate, up);
  const int64_t rows = gate.size(0), columns = gate.size(1);
  const Activation kind = activation_of(activation);
  const ScalarType dtype = gate.scalar_type();
  OnDeviceOf device(gate);
  Tensor y = empty_like_rows(gate, rows, columns);
  dispatch_floats("gate", gate, [&](auto zero) {
    using T = decltype(zero);
    gated_activation<T>(
        {data_of<T>(gate), data_of<T>(up),
         optional_vector<T>("gate_bias", gate_bias, columns, dtype),
         optional_vector<T>("up_bias", up_bias, columns, dtype), nullptr, data_of<T>(y), nullptr,
         nullptr, rows, columns, gate.stride(0), columns, kind},
        device.stream());
  });
  return y;
}

// -> [M, 2 N]: dgate beside dup, the gradient of the fused projection.
Tensor op_gated_activation_backward(Tensor dy, Tensor gate, Tensor up, OptionalTensor gate_bias,
                                    OptionalTensor up_bias, int64_t activation) {
  check_gated(gate, up);
  const int64_t rows = gate.size(0), columns = gate.size(1);
  check_contiguous("dy", dy, rows, columns);
  check_dtype("dy", dy, gate.scalar_type());
  const Activation kind = activation_of(activation);
  const ScalarType dtype = gate.scalar_type();
  OnDeviceOf device(gate);
  Tensor both = empty_like_rows(gate, rows, 2 * columns);
  dispatch_floats("gate", gate, [&](auto zero) {
    using T = decltype(zero);
    T* out = data_of<T>(both);
    gated_activation<T>(
        {data_of<T>(gate), data_of<T>(up),
         optional_vector<T>("gate_bias", gate_bias, columns, dtype),
         optional_vector<T>("up_bias", up_bias, columns, dtype), data_of<T>(dy), nullptr, out,
         out + columns, rows, columns, gate.stride(0), 2 * columns, kind},
        device.stream());
  });
  return both;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyparallel, m) {
  m.def("cuda_bias_activation(Tensor x, Tensor? bias, int activation) -> Tensor");
  m.def(
      "cuda_bias_activation_backward(Tensor dy, Tensor x, Tensor? bias, int activation) -> Tensor");
  m.def(
      "cuda_gated_activation(Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias,"
      " int activation) -> Tensor");
  m.def(
      "cuda_gated_activation_backward(Tensor dy, Tensor gate, Tensor up, Tensor? gate_bias,"
      " Tensor? up_bias, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyparallel, CUDA, m) {
  m.impl("cuda_bias_activation", TORCH_BOX(&op_bias_activation));
  m.impl("cuda_bias_activation_backward", TORCH_BOX(&op_bias_activation_backward));
  m.impl("cuda_gated_activation", TORCH_BOX(&op_gated_activation));
  m.impl("cuda_gated_activation_backward", TORCH_BOX(&op_gated_activation_backward));
}

}  // namespace pyparallel::cuda
