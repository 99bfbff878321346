#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Host objects of pyparallel's C++ extension; its torch ops live in torch.ops.pyparallel.";
  pyparallel::bind_build(m);
  pyparallel::bind_collectives(m);
  pyparallel::bind_cpu_ops(m);
  pyparallel::bind_decode(m);
  pyparallel::bind_dropout(m);
  pyparallel::bind_shared_buffer(m);
  pyparallel::bind_rank_sum(m);
}
