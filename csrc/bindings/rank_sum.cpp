// Sums over ranks fused with what follows them, for a few rows: the partial sums lie in the engine's slots,
// where the peers read them. Addresses come from pyparallel/ops/cpu/linear_all_reduce.py.
#include <pybind11/pybind11.h>

#include "bindings/addresses.h"
#include "bindings/bindings.h"
#include "bindings/python_group.h"
#include "cpu/ops/rank_sum.h"

namespace py = pybind11;

namespace pyparallel {

using namespace cpu;

static void bind_rank_sum(py::module_& m) {
  m.def(
      "slot_bytes", [](PythonGroup& self) { return self.group.slot_bytes(); }, py::arg("group"),
      "What a rank can show the others at once.");
  m.def(
      "own_slot",
      [](PythonGroup& self) { return reinterpret_cast<uintptr_t>(self.group.own_slot()); },
      py::arg("group"), "Where this rank writes what its next exchange shows.");
  m.def(
      "rank_sum",
      [](PythonGroup& self, uintptr_t partial, bool wide, int64_t M, int64_t H, int precision,
         uintptr_t bias, uintptr_t y) {
        self.run([&](Group& group) {
          const RankSum sum = show_rows(group, pointer(partial), wide, M, H, Precision(precision));
          rank_sum(sum, pointer(bias), pointer(y));
        });
      },
      py::arg("group"), py::arg("partial"), py::arg("wide"), py::arg("M"), py::arg("H"),
      py::arg("precision"), py::arg("bias"), py::arg("y"));
  m.def(
      "rank_sum_residual_rms_norm",
      [](PythonGroup& self, uintptr_t partial, bool wide, int64_t M, int64_t H, int precision,
         uintptr_t residual, uintptr_t weight, float eps, uintptr_t h, uintptr_t y) {
        self.run([&](Group& group) {
          const RankSum sum = show_rows(group, pointer(partial), wide, M, H, Precision(precision));
          rank_sum_residual_rms_norm(sum, pointer(residual), pointer<const float>(weight), eps,
                                     pointer(h), pointer(y));
        });
      },
      py::arg("group"), py::arg("partial"), py::arg("wide"), py::arg("M"), py::arg("H"),
      py::arg("precision"), py::arg("residual"), py::arg("weight"), py::arg("eps"), py::arg("h"),
      py::arg("y"));
}

static const Binding binding(bind_rank_sum);

}  // namespace pyparallel
