// The kernels for any processor.
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/pack.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/thin_streams.h"

namespace pyparallel::cpu {
namespace {
#include "cpu/simd/plain.inl"

#include "cpu/kernels/kernel_bodies.inl"
}  // namespace

const Kernels& kernels_plain() {
  static const Kernels table = kernel_table();
  return table;
}

}  // namespace pyparallel::cpu
