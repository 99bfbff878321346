// Dropout on addresses; tensors are checked by pyparallel/ops/cpu/dropout.py.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "cpu/ops/dropout.h"

namespace py = pybind11;

namespace pyparallel {

static void bind_dropout(py::module_& m) {
  m.def(
      "cpu_dropout",
      [](uintptr_t x, uintptr_t out, uint32_t dtype, int64_t n, uint64_t first, uint64_t seed,
         uint64_t threshold, float scale) {
        const py::gil_scoped_release release;
        cpu::dropout(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out),
                     cpu::DType(dtype), n, first, seed, threshold, scale);
      },
      py::arg("x"), py::arg("out"), py::arg("dtype"), py::arg("n"), py::arg("first"),
      py::arg("seed"), py::arg("threshold"), py::arg("scale"),
      "out[n] = x * scale where the mask of the places from `first` on keeps, else 0.");
}

static const Binding binding(bind_dropout);

}  // namespace pyparallel
