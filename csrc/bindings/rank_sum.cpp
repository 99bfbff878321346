// Sums over ranks fused with what follows them, for a few rows: the partial sums lie in the engine's slots,
// where the peers read them. Addresses come from pyparallel/ops/shared_memory_all_reduce.py.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "bindings/python_group.h"
#include "cpu/ops/rank_sum.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using namespace cpu;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(Precision precision) {
  switch (precision) {
    case Precision::f32: return DType::float32;
    case Precision::bf16: return DType::bfloat16;
    default: return DType::float16;
  }
}

// Shows this rank's rows and waits for everybody's. `partial` is 0 where they are in the slot already;
// `wide`: it is fp32, and is rounded on its way there.
RankSum exchanged(Group& group, uintptr_t partial, bool wide, int64_t M, int64_t H, int precision) {
  RankSum sum{};
  sum.ranks = group.size();
  sum.M = M;
  sum.H = H;
  sum.precision = Precision(precision);
  const int64_t bytes = M * H * bytes_of(sum.precision);
  if (bytes > group.slot_bytes()) {
    throw std::invalid_argument("rows: expected at most " + std::to_string(group.slot_bytes()) +
                                " bytes, got " + std::to_string(bytes));
  }
  if (partial != 0 && wide) {
    kernels().from_float(pointer<const float>(partial), sum.precision, M * H, group.own_slot());
  } else if (partial != 0) {
    std::memcpy(group.own_slot(), pointer(partial), size_t(bytes));
  }
  group.exchange(M * H, dtype_of(sum.precision));
  for (int r = 0; r < sum.ranks; ++r) sum.parts[r] = group.slot_of(r);
  return sum;
}

}  // namespace

void bind_rank_sum(py::module_& m) {
  m.def("slot_bytes", [](PythonGroup& self) { return self.group.slot_bytes(); }, py::arg("group"),
        "What a rank can show the others at once.");
  m.def("own_slot", [](PythonGroup& self) { return reinterpret_cast<uintptr_t>(self.group.own_slot()); },
        py::arg("group"), "Where this rank writes what its next exchange shows.");
  m.def(
      "rank_sum",
      [](PythonGroup& self, uintptr_t partial, bool wide, int64_t M, int64_t H, int precision,
         uintptr_t bias, uintptr_t y) {
        self.run([&](Group& group) {
          rank_sum(exchanged(group, partial, wide, M, H, precision), pointer(bias), pointer(y));
        });
      },
      py::arg("group"), py::arg("partial"), py::arg("wide"), py::arg("M"), py::arg("H"),
      py::arg("precision"), py::arg("bias"), py::arg("y"));
  m.def(
      "rank_sum_residual_rms_norm",
      [](PythonGroup& self, uintptr_t partial, bool wide, int64_t M, int64_t H, int precision,
         uintptr_t residual, uintptr_t weight, float eps, uintptr_t h, uintptr_t y) {
        self.run([&](Group& group) {
          const RankSum sum = exchanged(group, partial, wide, M, H, precision);
          rank_sum_residual_rms_norm(sum, pointer(residual), pointer<const float>(weight), eps, pointer(h),
                                     pointer(y));
        });
      },
      py::arg("group"), py::arg("partial"), py::arg("wide"), py::arg("M"), py::arg("H"),
      py::arg("precision"), py::arg("residual"), py::arg("weight"), py::arg("eps"), py::arg("h"),
      py::arg("y"));
}

}  // namespace pyparallel
