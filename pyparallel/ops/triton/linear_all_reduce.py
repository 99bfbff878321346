"""``linear_all_reduce`` on Triton, as one kernel."""

from __future__ import annotations

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.ops.linear import rows
from pyparallel.ops.triton._fused_linear import fused_reason as reason  # noqa: F401
from pyparallel.ops.triton._fused_linear import matmul_reduce


def run(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """``y[..., M]``, the whole sum, of ``x[..., K_r]``. No autograd."""
    y = matmul_reduce(rows(x), weight, bias, group)
    return y.view(*x.shape[:-1], weight.shape[0])
