// Soft-capping on addresses; tensors are checked by pyparallel/ops/cpu/softcap.py.
#include "bindings/addresses.h"
#include "bindings/bindings.h"
#include "cpu/ops/pool.h"
#include "cpu/simd/each_isa.h"

namespace py = pybind11;

namespace pyparallel {
namespace cpu {
namespace {

#define PYPARALLEL_BODY "cpu/kernels/softcap.inl"
#include "cpu/simd/each_isa.inl"

// What a thread takes at a time: 4096 elements, so that no line of memory is written by two.
constexpr int64_t kChunk = 4096;

// body(T{}, first element, how many) for every chunk of n elements.
template <class Body>
void for_each_chunk(Precision precision, int64_t n, int threads, Body body) {
  for_each_row(ceil_div(n, kChunk), kChunk, threads, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, count = n - first < kChunk ? n - first : kChunk;
    switch (precision) {
      case Precision::f32: return body(float{}, first, count);
      case Precision::bf16: return body(BFloat16{}, first, count);
      case Precision::f16: return body(Half{}, first, count);
      default: __builtin_unreachable();
    }
  });
}

void softcap_at(uintptr_t x, float cap, int precision, int64_t n, uintptr_t y, int threads) {
  for_each_chunk(Precision(precision), n, threads, [&](auto zero, int64_t first, int64_t count) {
    using T = decltype(zero);
    of_isa(plain::softcap<T>, avx2::softcap<T>, avx512::softcap<T>)(
        pointer<const T>(x) + first, cap, count, pointer<T>(y) + first);
  });
}

void softcap_backward_at(uintptr_t dy, uintptr_t x, float cap, int precision, int64_t n,
                         uintptr_t dx, int threads) {
  for_each_chunk(Precision(precision), n, threads, [&](auto zero, int64_t first, int64_t count) {
    using T = decltype(zero);
    of_isa(plain::softcap_backward<T>, avx2::softcap_backward<T>, avx512::softcap_backward<T>)(
        pointer<const T>(dy) + first, pointer<const T>(x) + first, cap, count,
        pointer<T>(dx) + first);
  });
}

}  // namespace
}  // namespace cpu

static const Binding binding([](py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("cpu_softcap", &cpu::softcap_at, Unlocked(), py::arg("x"), py::arg("cap"),
        py::arg("precision"), py::arg("n"), py::arg("y"), py::arg("threads"));
  m.def("cpu_softcap_backward", &cpu::softcap_backward_at, Unlocked(), py::arg("dy"), py::arg("x"),
        py::arg("cap"), py::arg("precision"), py::arg("n"), py::arg("dx"), py::arg("threads"));
});

}  // namespace pyparallel
