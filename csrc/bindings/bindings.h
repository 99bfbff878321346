// The areas of the extension; each is bound in a file of its own name.
#pragma once

#include <pybind11/pybind11.h>

namespace pyparallel {

// What this machine's processor and this build offer.
void bind_build(pybind11::module_& m);

// The collectives engine of CPU ranks.
void bind_collectives(pybind11::module_& m);

// The compute kernels of a CPU rank, on addresses.
void bind_cpu_ops(pybind11::module_& m);

// A whole decoder of a CPU rank.
void bind_decode(pybind11::module_& m);

// Dropout with a mask that does not depend on the number of ranks.
void bind_dropout(pybind11::module_& m);

// Memory that all ranks of a group read in place.
void bind_shared_buffer(pybind11::module_& m);

// Sums over ranks fused with what follows them.
void bind_rank_sum(pybind11::module_& m);

}  // namespace pyparallel
