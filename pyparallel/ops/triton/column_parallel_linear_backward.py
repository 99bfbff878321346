"""The gradients of a column-parallel linear on Triton: dx and its sum as one kernel."""

from __future__ import annotations

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.ops.linear import rows
from pyparallel.ops.triton import linear_wgrad
from pyparallel.ops.triton._fused_linear import fused_reason as reason  # noqa: F401
from pyparallel.ops.triton._fused_linear import matmul_reduce


def run(
    grad: Tensor, x: Tensor, weight: Tensor, group: Group, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx, the whole sum, and dw_shard_m, each where ``needs`` asks for it."""
    grad_x = None
    if needs[0]:
        grad_x = matmul_reduce(rows(grad), weight.t(), None, group).view(x.shape)
    return grad_x, linear_wgrad.run(grad, x) if needs[1] else None
