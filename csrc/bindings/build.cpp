#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/simd/isa.h"

namespace pyparallel {

void bind_build(pybind11::module_& m) {
  m.def(
      "isa", [] { return std::string(cpu::isa_name(cpu::detected_isa())); },
      "The widest instruction set the kernels may use here: 'avx512', 'avx2' or 'plain'.");
}

}  // namespace pyparallel
