// Memory that all ranks of a group can read in place, for fused operations written in Python.
//
// Two halves are used in turn. A half is written again two turns later, and whoever has announced the
// turn between has read it, so no trailing barrier is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/python_group.h"
#include "core/part.h"
#include "cpu/world/group.h"
#include "cpu/world/lanes.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using cpu::DType;
using cpu::Group;

class SharedBuffer {
 public:
  // A call of all ranks, with the same `bytes`: the most one turn can hold.
  SharedBuffer(PythonGroup& group, int64_t bytes)
      : group_(group), half_(round_up(max_of(bytes, 1), 4096)) {
    group_.run([&](Group& g) { window_ = g.window(2 * half_); });
  }

  int64_t bytes() const { return half_; }

  // Rank `rank`'s half of a turn; this rank's own is for writing until it is announced.
  py::memoryview memory(int rank, int turn) {
    return py::memoryview::from_memory(window_->of(rank) + turn * half_, half_);
  }

  // This rank's half is written. `bytes` and `dtype` must be the same on all ranks.
  void announce(int64_t bytes, uint32_t dtype) {
    group_.run([&](Group& g) { g.announce(bytes, DType(dtype)); });
  }

  // Waits until all ranks have announced.
  void await() {
    group_.run([&](Group& g) { g.await(); });
  }

 private:
  PythonGroup& group_;
  int64_t half_;
  std::unique_ptr<cpu::Window> window_;
};

// output[n] = the parts' sum in their order, in fp32, rounded once.
void sum_parts(uintptr_t output, const std::vector<uintptr_t>& parts, int64_t n, uint32_t dtype) {
  const py::gil_scoped_release release;
  cpu::visit_reducible(DType(dtype), [&](auto zero) {
    using T = decltype(zero);
    const auto source = [&](int r) { return reinterpret_cast<const T*>(parts[size_t(r)]); };
    cpu::SimdLanes().fold<Sum>(reinterpret_cast<T*>(output), source, int(parts.size()), n,
                               Store::cached);
  });
}

}  // namespace

static void bind_shared_buffer(py::module_& m) {
  py::class_<SharedBuffer>(m, "SharedBuffer",
                           "Memory of every rank of a group that the others read in place.")
      .def(py::init<PythonGroup&, int64_t>(), py::arg("group"), py::arg("bytes"),
           py::keep_alive<1, 2>())
      .def_property_readonly("bytes", &SharedBuffer::bytes)
      .def("memory", &SharedBuffer::memory, py::arg("rank"), py::arg("turn"),
           py::keep_alive<0, 1>())
      .def("announce", &SharedBuffer::announce, py::arg("bytes"), py::arg("dtype"))
      .def("await_all", &SharedBuffer::await);
  m.def("sum_parts", &sum_parts, py::arg("output"), py::arg("parts"), py::arg("n"),
        py::arg("dtype"), "output[n] = the sum of the parts in their order, rounded once.");
}

static const Binding binding(bind_shared_buffer);

}  // namespace pyparallel
