// The operations of csrc/cpu/ops on tensors, as addresses: pyparallel/native/cpu/ops.py checks shapes and
// dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings/addresses.h"
#include "bindings/bindings.h"
#include "cpu/ops/attention.h"
#include "cpu/ops/linear.h"
#include "cpu/ops/norm.h"
#include "cpu/ops/rope.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using namespace cpu;
using Unlocked = py::call_guard<py::gil_scoped_release>;

void linear_at(uintptr_t x, int64_t x_stride, int64_t M, int64_t K, int64_t N,
               const WeightTuple& weight, const py::tuple& up, int activation, uintptr_t residual,
               uintptr_t y, bool bf16_compute, bool thin, int threads) {
  LinearCall call{};
  call.x = pointer<const float>(x);
  call.x_stride = x_stride;
  call.M = M;
  call.K = K;
  call.weight = weight_of(weight);
  if (!up.empty()) call.up = weight_of(up.cast<WeightTuple>());
  call.act = Activation(activation);
  call.residual = pointer<const float>(residual);
  call.residual_stride = N;
  call.y = pointer<float>(y);
  call.y_stride = N;
  call.bf16_compute = bf16_compute;
  const py::gil_scoped_release release;
  linear(call, N, thin, threads);
}

void attention_at(uintptr_t q, int64_t B, int64_t S, int64_t N, int64_t D, uintptr_t keys,
                  uintptr_t values, int64_t batch_stride, int64_t head_stride, int64_t key_stride,
                  int precision, int64_t Nk, int64_t start, int64_t window, uintptr_t out,
                  int threads) {
  attention({pointer<const float>(q), B, S, N, D, pointer<const void>(keys),
             pointer<const void>(values), batch_stride, head_stride, key_stride,
             Precision(precision), Nk, start, window, pointer<float>(out)},
            threads);
}

}  // namespace

static void bind_cpu_ops(py::module_& m) {
  m.def(
      "use_isa", [](const std::string& name) { isa_in_use().store(isa_from_name(name)); },
      py::arg("name"),
      "Let the kernels use this instruction set: 'plain', 'avx2', 'avx512' or 'avx512_bf16'.");
  m.def(
      "isa_in_use", [] { return std::string(isa_name(isa_in_use().load())); },
      "The instruction set the kernels use: the widest there is, unless PYPARALLEL_ISA or use_isa "
      "says another.");
  m.def("cpu_linear", &linear_at, py::arg("x"), py::arg("x_stride"), py::arg("M"), py::arg("K"),
        py::arg("N"), py::arg("weight"), py::arg("up"), py::arg("activation"), py::arg("residual"),
        py::arg("y"), py::arg("bf16_compute"), py::arg("thin"), py::arg("threads"));
  m.def("cpu_attention", &attention_at, Unlocked(), py::arg("q"), py::arg("B"), py::arg("S"),
        py::arg("N"), py::arg("D"), py::arg("keys"), py::arg("values"), py::arg("batch_stride"),
        py::arg("head_stride"), py::arg("key_stride"), py::arg("precision"), py::arg("Nk"),
        py::arg("start"), py::arg("window"), py::arg("out"), py::arg("threads"));
  m.def(
      "cpu_rms_norm",
      [](uintptr_t x, uintptr_t weight, float eps, int64_t rows, int64_t n, uintptr_t y,
         int threads) {
        rms_norm(pointer<const float>(x), pointer<const float>(weight), eps, rows, n,
                 pointer<float>(y), threads);
      },
      Unlocked(), py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("rows"), py::arg("n"),
      py::arg("y"), py::arg("threads"));
  m.def(
      "cpu_layer_norm",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, float eps, int64_t rows, int64_t n,
         uintptr_t y, int threads) {
        layer_norm(pointer<const float>(x), pointer<const float>(weight),
                   pointer<const float>(bias), eps, rows, n, pointer<float>(y), threads);
      },
      Unlocked(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("rows"),
      py::arg("n"), py::arg("y"), py::arg("threads"));
  m.def(
      "cpu_rope",
      [](uintptr_t x, uintptr_t cos, uintptr_t sin, int64_t rows, int64_t heads, int64_t D,
         int64_t rotary, int threads) {
        rope(pointer<float>(x), pointer<const float>(cos), pointer<const float>(sin), rows, heads,
             D, rotary, threads);
      },
      Unlocked(), py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("rows"), py::arg("heads"),
      py::arg("D"), py::arg("rotary"), py::arg("threads"));
}

static const Binding binding(bind_cpu_ops);

}  // namespace pyparallel
