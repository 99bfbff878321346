// Soft-capping as torch ops. Equations: cuda/kernels/softcap.h.
#include "cuda/kernels/softcap.h"
#include "cuda/bindings/tensor_arguments.h"

namespace pyparallel::cuda {
namespace {

void check_elements(const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(name, "a CUDA tensor", "one on another device; call .cuda()");
  if (!tensor.is_contiguous()) fail(name, "a contiguous tensor", "strides; call .contiguous()");
}

Tensor run(const Tensor& x, const Tensor* dy, double cap) {
  check_elements("x", x);
  if (dy != nullptr) {
    check_elements("dy", *dy);
    check_dtype("dy", *dy, x.scalar_type());
    if (dy->numel() != x.numel()) fail("dy", shape_text(x), shape_text(*dy));
  }
  OnDeviceOf device(x);
  Tensor y = torch::stable::empty_like(x);
  dispatch_floats("x", x, [&](auto zero) {
    using T = decltype(zero);
    softcap<T>({data_of<const T>(x), dy == nullptr ? nullptr : data_of<const T>(*dy), data_of<T>(y),
                x.numel(), float(cap)},
               device.stream());
  });
  return y;
}

Tensor op_softcap(Tensor x, double cap) { return run(x, nullptr, cap); }

Tensor op_softcap_backward(Tensor dy, Tensor x, double cap) { return run(x, &dy, cap); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyparallel, m) {
  m.def("cuda_softcap(Tensor x, float cap) -> Tensor");
  m.def("cuda_softcap_backward(Tensor dy, Tensor x, float cap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyparallel, CUDA, m) {
  m.impl("cuda_softcap", TORCH_BOX(&op_softcap));
  m.impl("cuda_softcap_backward", TORCH_BOX(&op_softcap_backward));
}

}  // namespace pyparallel::cuda
