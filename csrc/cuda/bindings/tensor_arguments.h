// How the ops take tensors: checks with one clear line, the dtype, the stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/pack.h"

// Of torch's C shim; weak, since a CPU build of torch has no such symbol and the extension
// loads there too. Stream::nativeHandle() would ask for torch 2.13.
extern "C" __attribute__((weak, visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pyparallel::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes the tensor's device current for the scope of an op, and gives its current stream.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current) != 0) {
      throw std::runtime_error("torch gives no CUDA stream; install a CUDA build of torch");
    }
    handle = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream() const { return handle; }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t handle = nullptr;
};

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

inline void fail(const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got);
}

// A CUDA tensor [rows, columns] whose rows are contiguous; the stride between rows is free.
inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  if (!tensor.is_cuda()) fail(name, "a CUDA tensor", "one on another device; call .cuda()");
  if (tensor.dim() != 2 || tensor.size(0) != rows || tensor.size(1) != columns) {
    fail(name, "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]",
         shape_text(tensor));
  }
  if (columns > 1 && tensor.stride(1) != 1) {
    fail(name, "contiguous rows",
         "a stride of " + std::to_string(tensor.stride(1)) +
             " between elements; call .contiguous()");
  }
}

inline void check_contiguous(const char* name, const Tensor& tensor, int64_t rows,
                             int64_t columns) {
  check_matrix(name, tensor, rows, columns);
  if (!tensor.is_contiguous()) fail(name, "a contiguous tensor", "strides; call .contiguous()");
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t length) {
  if (!tensor.is_cuda()) fail(name, "a CUDA tensor", "one on another device; call .cuda()");
  if (tensor.dim() != 1 || tensor.size(0) != length || !tensor.is_contiguous()) {
    fail(name, "a contiguous [" + std::to_string(length) + "]", shape_text(tensor));
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    fail(name, "the dtype of the first argument (or float32 for statistics, int64 for targets)",
         "another one; call .to()");
  }
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Null if there is no tensor; checked as a vector of `length` of x's dtype otherwise.
template <class T>
const T* optional_vector(const char* name, const OptionalTensor& tensor, int64_t length,
                         ScalarType dtype) {
  if (!tensor) return nullptr;
  check_vector(name, *tensor, length);
  check_dtype(name, *tensor, dtype);
  return data_of<const T>(*tensor);
}

// Calls body(T{}) with the element type of a float tensor.
template <class Body>
void dispatch_floats(const char* name, const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: fail(name, "float32, float16 or bfloat16", "another dtype; call .to()");
  }
}

inline Tensor empty_like_rows(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::new_empty(like, {sizes, 2});
}

inline Tensor empty_vector(const Tensor& like, int64_t length, std::optional<ScalarType> dtype) {
  const int64_t sizes[] = {length};
  return torch::stable::new_empty(like, {sizes, 1}, dtype);
}

}  // namespace pyparallel::cuda
