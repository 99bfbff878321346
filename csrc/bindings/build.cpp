#include <string>

#include "bindings/bindings.h"
#include "core/activation.h"
#include "cpu/simd/isa.h"

namespace pyparallel {

static void bind_build(pybind11::module_& m) {
  pybind11::dict activations;
  for (int code = 0; code < kActivations; ++code) activations[kActivationNames[code]] = code;
  m.attr("ACTIVATIONS") = activations;
  m.def(
      "isa", [] { return std::string(cpu::isa_name(cpu::detected_isa())); },
      "The widest instruction set the kernels may use here: 'avx512_bf16', 'avx512', 'avx2' or "
      "'plain'.");
}

static const Binding binding(bind_build);

}  // namespace pyparallel
