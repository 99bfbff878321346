// The group of CPU ranks as a Python object; tensors come as addresses and element counts, checked
// by pyparallel/comm/shared/engine.py.
#include <pybind11/stl.h>

#include <exception>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/python_group.h"
#include "cpu/world/shared_memory.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using cpu::DType;
using cpu::Group;
using cpu::PeerError;
using cpu::Reduction;

// A tensor's memory: its address, as data_ptr() gives it.
void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

Split split_of(const Group& group, int64_t n, const py::object& counts) {
  if (counts.is_none()) return Split::equal(n, group.size());
  Split split{};
  int r = 0;
  for (const py::handle count : counts) {
    if (r < group.size()) split.begin[r + 1] = split.begin[r] + count.cast<int64_t>();
    ++r;
  }
  return split;
}

}  // namespace

void set_python_error(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const PeerError& error) {
    const py::object type = py::module_::import("pyparallel.comm.communicator").attr("PeerError");
    const py::object value = type(error.what());
    value.attr("operation") = error.operation;
    value.attr("sequence") = error.sequence;
    value.attr("group") = error.group;
    value.attr("missing") = py::tuple(py::cast(error.missing));
    PyErr_SetObject(type.ptr(), value.ptr());
  } catch (const cpu::Interrupted&) {
    // The signal handler's exception, KeyboardInterrupt as a rule, is already set.
  }
}

static void bind_collectives(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    if (thrown) set_python_error(thrown);
  });
  bind_fast_collectives(m);

  m.def(
      "create_shared_memory",
      [](int size) { return cpu::create_shared_memory(Group::shared_bytes(size)); },
      py::arg("size"), "A descriptor of the shared memory of a group of that many ranks.");

  py::class_<PythonGroup>(m, "SharedMemoryGroup",
                          "A rank's place in a group of CPU ranks that share memory.")
      .def(py::init<std::string, int, int, int, std::vector<int>, double>(), py::arg("name"),
           py::arg("rank"), py::arg("size"), py::arg("memory_descriptor"),
           py::arg("process_descriptors"), py::arg("timeout_s"))
      .def_property_readonly("sequence",
                             [](const PythonGroup& self) { return self.group.sequence(); })
      .def_property(
          "timeout_s", [](PythonGroup& self) { return self.group.waiter().timeout_s; },
          [](PythonGroup& self, double value) { self.group.waiter().timeout_s = value; })
      .def_property(
          "rest_after_s", [](PythonGroup& self) { return self.group.waiter().rest_after_s; },
          [](PythonGroup& self, double value) { self.group.waiter().rest_after_s = value; })
      .def("barrier", [](PythonGroup& self) { self.run([](Group& g) { g.barrier(); }); })
      .def("all_reduce",
           [](PythonGroup& self, uintptr_t data, int64_t n, uint32_t dtype, uint32_t reduction) {
             self.run(
                 [&](Group& g) { g.all_reduce(at(data), n, DType(dtype), Reduction(reduction)); });
           })
      .def("reduce_scatter",
           [](PythonGroup& self, uintptr_t output, uintptr_t input, int64_t n,
              const py::object& counts, uint32_t dtype, uint32_t reduction) {
             const Split split = split_of(self.group, n, counts);
             self.run([&](Group& g) {
               g.reduce_scatter(at(output), at(input), split, DType(dtype), Reduction(reduction));
             });
           })
      .def("all_gather",
           [](PythonGroup& self, uintptr_t output, uintptr_t input, int64_t n,
              const py::object& counts, uint32_t dtype) {
             const Split split = split_of(self.group, n, counts);
             self.run([&](Group& g) { g.all_gather(at(output), at(input), split, DType(dtype)); });
           })
      .def("all_to_all",
           [](PythonGroup& self, uintptr_t output, uintptr_t input, int64_t output_n,
              int64_t input_n, const py::object& output_counts, const py::object& input_counts,
              uint32_t dtype) {
             const Split output_split = split_of(self.group, output_n, output_counts);
             const Split input_split = split_of(self.group, input_n, input_counts);
             self.run([&](Group& g) {
               g.all_to_all(at(output), at(input), output_split, input_split, DType(dtype));
             });
           })
      .def("broadcast",
           [](PythonGroup& self, uintptr_t data, int64_t n, uint32_t dtype, int root) {
             self.run([&](Group& g) { g.broadcast(at(data), n, DType(dtype), root); });
           })
      .def("send",
           [](PythonGroup& self, uintptr_t data, int64_t n, uint32_t dtype, int peer, int tag) {
             self.run([&](Group& g) { g.send(at(data), n, DType(dtype), peer, tag); });
           })
      .def("receive",
           [](PythonGroup& self, uintptr_t data, int64_t n, uint32_t dtype, int peer, int tag) {
             self.run([&](Group& g) { g.receive(at(data), n, DType(dtype), peer, tag); });
           })
      .def("flush", [](PythonGroup& self) { self.run([](Group& g) { g.flush(); }); })
      .def("close", [](PythonGroup& self) { self.run([](Group& g) { g.close(); }); });
}

static const Binding binding(bind_collectives);

}  // namespace pyparallel
