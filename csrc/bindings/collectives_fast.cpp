// The short way from Python into the engine, for calls in which all is as it should be: exact
// tensors, on the CPU, contiguous, of known types and fitting sizes. Each function returns False,
// without having done anything, where something is not; pyparallel/comm/shared/engine.py then finds out
// what and says so. A small all-reduce takes half a microsecond, so how Python gets here matters:
// vectorcall functions over tensors cost a tenth of one, pybind11 with data_ptr() and checks one.
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "bindings/bindings.h"
#include "bindings/python_group.h"

namespace py = pybind11;

namespace pyparallel {
namespace {

using cpu::DType;
using cpu::Group;
using cpu::Reduction;

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kByte: return DType::uint8;
    case at::kChar: return DType::int8;
    case at::kBool: return DType::boolean;
    case at::kShort: return DType::int16;
    case at::kInt: return DType::int32;
    case at::kLong: return DType::int64;
    case at::kHalf: return DType::float16;
    case at::kBFloat16: return DType::bfloat16;
    case at::kFloat: return DType::float32;
    case at::kDouble: return DType::float64;
    default: return std::nullopt;
  }
}

bool is_reducible(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16:
    case DType::float32:
    case DType::float64:
    case DType::int32:
    case DType::int64: return true;
    default: return false;
  }
}

// The tensor in a Python object, or null where it is not the plain kind.
const at::Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return tensor.is_cpu() && tensor.is_contiguous() && !tensor.is_neg() ? &tensor : nullptr;
}

Reduction reduction_of(PyObject* name) {
  if (!PyUnicode_Check(name)) return Reduction::none;
  if (PyUnicode_CompareWithASCIIString(name, "sum") == 0) return Reduction::sum;
  if (PyUnicode_CompareWithASCIIString(name, "max") == 0) return Reduction::max;
  if (PyUnicode_CompareWithASCIIString(name, "min") == 0) return Reduction::min;
  return Reduction::none;
}

// The parts of `whole` elements that `counts`, None or a list, stands for; nothing if they do not
// fit, or if this rank's is not `own`.
bool read_split(PyObject* counts, int64_t whole, int64_t own, int rank, int size, Split& split) {
  if (counts == Py_None) {
    if (own * size != whole) return false;
    for (int r = 0; r <= size; ++r) split.begin[r] = own * r;
    return true;
  }
  if (!PyList_CheckExact(counts) || PyList_GET_SIZE(counts) != size) return false;
  split.begin[0] = 0;
  for (int r = 0; r < size; ++r) {
    PyObject* item = PyList_GET_ITEM(counts, r);
    if (!PyLong_CheckExact(item)) return false;
    const int64_t count = PyLong_AsLongLong(item);
    if (count < 0) {
      PyErr_Clear();
      return false;
    }
    split.begin[r + 1] = split.begin[r] + count;
  }
  return split.begin[size] == whole && split[rank].size() == own;
}

template <class Body>
PyObject* run(PythonGroup& group, Body body) {
  try {
    group.run(body);
  } catch (...) {
    set_python_error(std::current_exception());
    return nullptr;
  }
  Py_RETURN_TRUE;
}

PythonGroup& group_in(PyObject* capsule) {
  return *static_cast<PythonGroup*>(PyCapsule_GetPointer(capsule, nullptr));
}

// (tensor, op)
PyObject* all_reduce(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const at::Tensor* tensor = count == 2 ? plain_tensor(arguments[0]) : nullptr;
  if (tensor == nullptr) Py_RETURN_FALSE;
  const Reduction reduction = reduction_of(arguments[1]);
  const auto dtype = dtype_of(tensor->scalar_type());
  if (!dtype || !is_reducible(*dtype) || reduction == Reduction::none) Py_RETURN_FALSE;
  return run(group_in(self), [&](Group& group) {
    group.all_reduce(tensor->data_ptr(), tensor->numel(), *dtype, reduction);
  });
}

// (output, input, counts)
PyObject* all_gather(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  PythonGroup& python_group = group_in(self);
  const at::Tensor* output = count == 3 ? plain_tensor(arguments[0]) : nullptr;
  const at::Tensor* input = output != nullptr ? plain_tensor(arguments[1]) : nullptr;
  if (input == nullptr || input->scalar_type() != output->scalar_type()) Py_RETURN_FALSE;
  const auto dtype = dtype_of(output->scalar_type());
  Split split;
  if (!dtype || !read_split(arguments[2], output->numel(), input->numel(),
                            python_group.group.rank(), python_group.group.size(), split)) {
    Py_RETURN_FALSE;
  }
  return run(python_group, [&](Group& group) {
    group.all_gather(output->data_ptr(), input->data_ptr(), split, *dtype);
  });
}

// (output, input, counts, op)
PyObject* reduce_scatter(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  PythonGroup& python_group = group_in(self);
  const at::Tensor* output = count == 4 ? plain_tensor(arguments[0]) : nullptr;
  const at::Tensor* input = output != nullptr ? plain_tensor(arguments[1]) : nullptr;
  if (input == nullptr || input->scalar_type() != output->scalar_type()) Py_RETURN_FALSE;
  const auto dtype = dtype_of(output->scalar_type());
  const Reduction reduction = reduction_of(arguments[3]);
  Split split;
  if (!dtype || !is_reducible(*dtype) || reduction == Reduction::none ||
      !read_split(arguments[2], input->numel(), output->numel(), python_group.group.rank(),
                  python_group.group.size(), split)) {
    Py_RETURN_FALSE;
  }
  return run(python_group, [&](Group& group) {
    group.reduce_scatter(output->data_ptr(), input->data_ptr(), split, *dtype, reduction);
  });
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef definition(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

}  // namespace

void bind_fast_collectives(py::module_& m) {
  m.def(
      "fast_collectives",
      [](py::object owner) {
        static PyMethodDef definitions[] = {definition<all_reduce>("all_reduce"),
                                            definition<all_gather>("all_gather"),
                                            definition<reduce_scatter>("reduce_scatter")};
        // The functions hold the capsule, and its context holds the group they call.
        PyObject* capsule = PyCapsule_New(owner.cast<PythonGroup*>(), nullptr, [](PyObject* self) {
          Py_DECREF(static_cast<PyObject*>(PyCapsule_GetContext(self)));
        });
        if (capsule == nullptr) throw py::error_already_set();
        const auto held = py::reinterpret_steal<py::object>(capsule);
        PyCapsule_SetContext(capsule, owner.inc_ref().ptr());
        py::dict functions;
        for (PyMethodDef& each : definitions) {
          PyObject* function = PyCFunction_New(&each, capsule);
          if (function == nullptr) throw py::error_already_set();
          functions[each.ml_name] = py::reinterpret_steal<py::object>(function);
        }
        return functions;
      },
      py::arg("group"),
      "all_reduce(tensor, op), all_gather(output, input, counts) and reduce_scatter(output, input, "
      "counts, op) of a SharedMemoryGroup: True if done, False if the arguments are not plain.");
}

}  // namespace pyparallel
