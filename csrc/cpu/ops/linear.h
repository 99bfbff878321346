// A matmul with its epilogue, cut over the outputs.
#pragma once

#include <cstdint>

#include "cpu/kernels/kernels.h"

namespace pyparallel::cpu {

// The whole of `call`, all N outputs: its range and workspace are set here. `thin`: by the kernel for at most
// kMaxThinRows rows.
void linear(const LinearCall& call, int64_t N, bool thin, int threads);

}  // namespace pyparallel::cpu
