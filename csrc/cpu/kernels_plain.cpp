// The kernels for any processor.
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/pack.h"
#include "cpu/kernels.h"
#include "cpu/thin_streams.h"

namespace pyparallel::cpu {
namespace {
#include "cpu/simd_plain.h"
#include "cpu/kernel_bodies.h"
}  // namespace

const Kernels& kernels_plain() {
  static const Kernels table = kernel_table();
  return table;
}

}  // namespace pyparallel::cpu
