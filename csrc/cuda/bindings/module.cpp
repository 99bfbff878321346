// Host objects of the CUDA extension: NCCL communicators and peer-memory groups. Its torch ops register
// themselves when the library is loaded.
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/activation.h"
#include "cuda/nccl/communicator.h"
#include "cuda/world/peer_group.h"

namespace py = pybind11;

namespace pyparallel::cuda {
namespace {

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void raise(const PeerError& error) {
  const py::object type = py::module_::import("pyparallel.comm.communicator").attr("PeerError");
  const py::object value = type(error.what());
  value.attr("operation") = error.operation;
  value.attr("sequence") = error.sequence;
  value.attr("group") = error.group;
  value.attr("missing") = py::tuple(py::cast(error.missing));
  PyErr_SetObject(type.ptr(), value.ptr());
}

std::vector<Message> messages_of(const std::vector<std::tuple<uintptr_t, int64_t, int>>& tuples) {
  std::vector<Message> messages;
  for (const auto& [address, count, peer] : tuples) messages.push_back({address, count, peer});
  return messages;
}

Split split_of(const std::vector<int64_t>& counts, int size, int64_t element) {
  if (int(counts.size()) != size) {
    throw std::invalid_argument("counts: expected " + std::to_string(size) +
                                ", one for each rank, got " + std::to_string(counts.size()));
  }
  Split split{};
  for (int r = 0; r < size; ++r) {
    split.begin[r + 1] = split.begin[r] + counts[size_t(r)] * element;
  }
  return split;
}

// Calls body(T{}) with the element type of an ncclDataType_t number.
template <class Body>
void dispatch_floats(int dtype, Body body) {
  switch (dtype) {
    case ncclFloat32: return body(float{});
    case ncclFloat16: return body(Half{});
    case ncclBfloat16: return body(BFloat16{});
    default:
      throw std::invalid_argument("dtype: expected float32, float16 or bfloat16, got NCCL type " +
                                  std::to_string(dtype) + "; use NCCL for others");
  }
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

void bind_nccl(py::module_& m) {
  py::class_<NcclCommunicator>(m, "NcclCommunicator")
      .def_static("unique_id", [] { return py::bytes(NcclCommunicator::unique_id()); })
      .def(py::init([](std::string name, const py::bytes& id, int rank, int size, double timeout) {
             const std::string bytes = id;
             py::gil_scoped_release unlocked;
             return std::make_unique<NcclCommunicator>(std::move(name), bytes, rank, size, timeout);
           }),
           py::arg("name"), py::arg("id"), py::arg("rank"), py::arg("size"), py::arg("timeout"))
      .def("split", &NcclCommunicator::split, Unlocked(), py::arg("color"), py::arg("key"),
           py::arg("name"))
      .def_property_readonly("rank", &NcclCommunicator::rank)
      .def_property_readonly("size", &NcclCommunicator::size)
      .def_property_readonly("name", &NcclCommunicator::name)
      .def_property_readonly("sequence", &NcclCommunicator::sequence)
      .def_property_readonly(
          "stream",
          [](const NcclCommunicator& c) { return reinterpret_cast<uintptr_t>(c.stream()); })
      .def(
          "all_gather",
          [](NcclCommunicator& c, uintptr_t output, uintptr_t input, int64_t count, int dtype,
             uintptr_t stream) { c.all_gather(output, input, count, dtype, stream_of(stream)); },
          Unlocked())
      .def(
          "reduce_scatter",
          [](NcclCommunicator& c, uintptr_t output, uintptr_t input, int64_t count, int dtype,
             int reduction, uintptr_t stream) {
            c.reduce_scatter(output, input, count, dtype, reduction, stream_of(stream));
          },
          Unlocked())
      .def(
          "all_reduce",
          [](NcclCommunicator& c, uintptr_t output, uintptr_t input, int64_t count, int dtype,
             int reduction, uintptr_t stream) {
            c.all_reduce(output, input, count, dtype, reduction, stream_of(stream));
          },
          Unlocked())
      .def(
          "broadcast",
          [](NcclCommunicator& c, uintptr_t data, int64_t count, int dtype, int root,
             uintptr_t stream) { c.broadcast(data, count, dtype, root, stream_of(stream)); },
          Unlocked())
      .def(
          "exchange",
          [](NcclCommunicator& c, const std::vector<std::tuple<uintptr_t, int64_t, int>>& sends,
             const std::vector<std::tuple<uintptr_t, int64_t, int>>& receives, int dtype,
             uintptr_t stream, const std::string& operation) {
            c.exchange(messages_of(sends), messages_of(receives), dtype, stream_of(stream),
                       operation.c_str());
          },
          Unlocked(), py::arg("sends"), py::arg("receives"), py::arg("dtype"), py::arg("stream"),
          py::arg("operation") = "exchange")
      .def("allocate_window", &NcclCommunicator::allocate_window, Unlocked(), py::arg("bytes"))
      .def("free_window", &NcclCommunicator::free_window, Unlocked(), py::arg("window"))
      .def("poll", &NcclCommunicator::poll, Unlocked())
      .def("fail", &NcclCommunicator::fail, Unlocked(), py::arg("reason"), py::arg("missing"))
      .def(
          "synchronize",
          [](NcclCommunicator& c, uintptr_t stream) { c.synchronize(stream_of(stream)); },
          Unlocked())
      .def("close", &NcclCommunicator::close, Unlocked());
}

void bind_peer_group(py::module_& m) {
  py::enum_<Algorithm>(m, "Algorithm")
      .value("one_shot", Algorithm::one_shot)
      .value("two_shot", Algorithm::two_shot);
  py::enum_<Reduction>(m, "Reduction")
      .value("sum", Reduction::sum)
      .value("max", Reduction::max)
      .value("min", Reduction::min);

  py::class_<IpcSegments>(m, "IpcSegments")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def("handle", [](const IpcSegments& s) { return py::bytes(s.handle()); })
      .def("open", &IpcSegments::open, py::arg("rank"), py::arg("handles"))
      .def("close", &IpcSegments::close);

  py::class_<PeerGroup>(m, "PeerGroup")
      .def(py::init<std::string, int, int64_t, double, const std::vector<uintptr_t>&>(),
           py::arg("name"), py::arg("rank"), py::arg("slot_bytes"), py::arg("timeout"),
           py::arg("bases"))
      .def_static("segment_bytes", &PeerGroup::segment_bytes, py::arg("size"),
                  py::arg("slot_bytes"))
      .def_property_readonly("rank", &PeerGroup::rank)
      .def_property_readonly("size", &PeerGroup::size)
      .def("check", &PeerGroup::check)
      .def("copy", [](PeerGroup& g, uintptr_t to, uintptr_t from, int64_t bytes,
                      uintptr_t stream) { g.copy(to, from, bytes, stream_of(stream)); })
      .def("fail", &PeerGroup::fail, py::arg("missing"))
      .def("all_reduce",
           [](PeerGroup& g, uintptr_t data, int64_t n, int dtype, Reduction reduction,
              Algorithm algorithm, uintptr_t stream) {
             dispatch_floats(dtype, [&](auto zero) {
               using T = decltype(zero);
               peer_all_reduce<T>(g.begin(PeerOperation::all_reduce, uint32_t(dtype), reduction,
                                          int(algorithm), n, 0),
                                  at<T>(data), n, reduction, algorithm, stream_of(stream));
             });
           })
      .def("reduce_scatter",
           [](PeerGroup& g, uintptr_t output, uintptr_t input, const std::vector<int64_t>& counts,
              int dtype, Reduction reduction, uintptr_t stream) {
             const Split split = split_of(counts, g.size(), 1);
             dispatch_floats(dtype, [&](auto zero) {
               using T = decltype(zero);
               peer_reduce_scatter<T>(
                   g.begin(PeerOperation::reduce_scatter, uint32_t(dtype), reduction, 0,
                           split.begin[g.size()], hash_of(split, g.size())),
                   at<T>(output), at<const T>(input), split, reduction, stream_of(stream));
             });
           })
      .def("all_gather",
           [](PeerGroup& g, uintptr_t output, uintptr_t input, const std::vector<int64_t>& counts,
              int64_t element, uintptr_t stream) {
             const Split split = split_of(counts, g.size(), element);
             peer_all_gather(g.begin(PeerOperation::all_gather, uint32_t(element), Reduction::none,
                                     0, split.begin[g.size()], hash_of(split, g.size())),
                             at<unsigned char>(output), at<const unsigned char>(input), split,
                             stream_of(stream));
           })
      .def("all_to_all",
           [](PeerGroup& g, uintptr_t output, uintptr_t input,
              const std::vector<int64_t>& output_counts, const std::vector<int64_t>& input_counts,
              int64_t element, uintptr_t stream) {
             peer_all_to_all(
                 g.begin(PeerOperation::all_to_all, uint32_t(element), Reduction::none, 0, 0, 0),
                 at<unsigned char>(output), at<const unsigned char>(input),
                 split_of(output_counts, g.size(), element),
                 split_of(input_counts, g.size(), element), stream_of(stream));
           })
      .def("broadcast",
           [](PeerGroup& g, uintptr_t data, int64_t bytes, int root, uintptr_t stream) {
             peer_broadcast(g.begin(PeerOperation::broadcast, 1, Reduction::none, root, bytes, 0),
                            at<unsigned char>(data), bytes, root, stream_of(stream));
           })
      .def("barrier",
           [](PeerGroup& g, uintptr_t stream) {
             peer_barrier(g.begin(PeerOperation::barrier, 0, Reduction::none, 0, 0, 0),
                          stream_of(stream));
           })
      .def("all_reduce_norm", [](PeerGroup& g, uintptr_t x, uintptr_t residual, uintptr_t weight,
                                 uintptr_t h, uintptr_t y, int64_t rows, int64_t hidden, double eps,
                                 int dtype, Algorithm algorithm, uintptr_t stream) {
        dispatch_floats(dtype, [&](auto zero) {
          using T = decltype(zero);
          const AllReduceNorm<T> a{at<const T>(x),
                                   at<const T>(residual),
                                   at<const T>(weight),
                                   at<T>(h),
                                   at<T>(y),
                                   rows,
                                   hidden,
                                   float(eps)};
          peer_all_reduce_norm<T>(g.begin(PeerOperation::all_reduce_norm, uint32_t(dtype),
                                          Reduction::sum, int(algorithm), rows, uint64_t(hidden)),
                                  a, algorithm, stream_of(stream));
        });
      });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "NCCL communicators and peer-memory groups; the torch ops are in torch.ops.pyparallel.";
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const PeerError& error) {
      raise(error);
    }
  });
  py::dict activations;
  for (int code = 0; code < kActivations; ++code) activations[kActivationNames[code]] = code;
  m.attr("ACTIVATIONS") = activations;
  m.def("nccl_version", [] {
    int version = 0;
    ncclGetVersion(&version);
    return version;
  });
  m.def(
      "architectures", [] { return std::string(PYPARALLEL_CUDA_ARCHITECTURES); },
      "The architectures this build holds machine code for.");
  m.def("device_count", [] {
    int count = 0;
    // No driver and no device are an answer, not an error.
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
      (void)cudaGetLastError();
      return 0;
    }
    return count;
  });
  bind_nccl(m);
  bind_peer_group(m);
}

}  // namespace pyparallel::cuda
