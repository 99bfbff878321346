#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Host objects of pyparallel's C++ extension; its torch ops live in torch.ops.pyparallel.";
  pyparallel::Binding::all(m);
}
