// Vocab-parallel cross entropy and the rank-ordered sum as torch ops. Equations: cross_entropy.h, rank_sum.h.
#include "cuda/bindings/tensor_arguments.h"
#include "cuda/kernels/kernels.h"

namespace pyparallel::cuda {
namespace {

template <class T>
CrossEntropy<T> arguments(const Tensor& logits, const Tensor& targets, int64_t offset,
                          int64_t ignored) {
  return {data_of<T>(logits),
          data_of<int64_t>(targets),
          logits.size(0),
          logits.size(1),
          logits.stride(0),
          offset,
          ignored};
}

void check_arguments(const Tensor& logits, const Tensor& targets) {
  check_matrix("logits", logits, logits.size(0), logits.size(1));
  check_vector("targets", targets, logits.size(0));
  check_dtype("targets", targets, ScalarType::Long);
}

// -> stats [M, 4] of this rank
Tensor op_cross_entropy_stats(Tensor logits, Tensor targets, int64_t offset, int64_t ignored) {
  check_arguments(logits, targets);
  OnDeviceOf device(logits);
  const int64_t sizes[] = {logits.size(0), kStats};
  Tensor stats = torch::stable::new_empty(logits, {sizes, 2}, ScalarType::Float);
  dispatch_floats("logits", logits, [&](auto zero) {
    using T = decltype(zero);
    cross_entropy_stats<T>(arguments<T>(logits, targets, offset, ignored), data_of<float>(stats),
                           device.stream());
  });
  return stats;
}

// Overwrites the logits [M, V_r] with their gradient.
void op_cross_entropy_gradient(Tensor logits, Tensor targets, Tensor lse, Tensor dloss,
                               int64_t offset, int64_t vocab, int64_t ignored, double smoothing,
                               double z_loss, OptionalTensor base) {
  check_arguments(logits, targets);
  check_vector("dloss", dloss, logits.size(0));
  check_vector("lse", lse, logits.size(0));
  check_dtype("dloss", dloss, ScalarType::Float);
  check_dtype("lse", lse, ScalarType::Float);
  const float* bases = optional_vector<float>("base", base, logits.size(0), ScalarType::Float);
  OnDeviceOf device(logits);
  dispatch_floats("logits", logits, [&](auto zero) {
    using T = decltype(zero);
    cross_entropy_gradient<T>(
        {arguments<T>(logits, targets, offset, ignored), data_of<float>(lse), data_of<float>(dloss),
         data_of<T>(logits), logits.stride(0), float(1.0 - smoothing),
         float(smoothing / double(vocab)), float(z_loss), bases},
        device.stream());
  });
}

// parts [R, M, N], strides free but for contiguous [M, N] blocks; writes out [M, N].
void op_rank_sum(Tensor parts, OptionalTensor bias, OptionalTensor residual, Tensor out) {
  if (!parts.is_cuda() || parts.dim() != 3)
    fail("parts", "a CUDA tensor [R, M, N]", shape_text(parts));
  const int64_t rows = parts.size(1), columns = parts.size(2);
  if ((columns > 1 && parts.stride(2) != 1) || (rows > 1 && parts.stride(1) != columns)) {
    fail("parts", "a contiguous [M, N] block for each rank", "other strides; call .contiguous()");
  }
  check_contiguous("out", out, rows, columns);
  check_dtype("out", out, parts.scalar_type());
  if (residual) {
    check_contiguous("residual", *residual, rows, columns);
    check_dtype("residual", *residual, parts.scalar_type());
  }
  OnDeviceOf device(parts);
  dispatch_floats("parts", parts, [&](auto zero) {
    using T = decltype(zero);
    rank_sum<T>({data_of<T>(parts), optional_vector<T>("bias", bias, columns, parts.scalar_type()),
                 residual ? data_of<const T>(*residual) : nullptr, data_of<T>(out),
                 int(parts.size(0)), parts.stride(0), rows, columns},
                device.stream());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyparallel, m) {
  m.def(
      "cuda_cross_entropy_stats(Tensor logits, Tensor targets, int offset, int ignored) -> Tensor");
  m.def(
      "cuda_cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor dloss,"
      " int offset, int vocab, int ignored, float smoothing, float z_loss, Tensor? base=None)"
      " -> ()");
  m.def("cuda_rank_sum(Tensor parts, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyparallel, CUDA, m) {
  m.impl("cuda_cross_entropy_stats", TORCH_BOX(&op_cross_entropy_stats));
  m.impl("cuda_cross_entropy_gradient_", TORCH_BOX(&op_cross_entropy_gradient));
  m.impl("cuda_rank_sum", TORCH_BOX(&op_rank_sum));
}

}  // namespace pyparallel::cuda
