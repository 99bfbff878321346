"""The gradients of ``all_gather_linear`` on Triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group import Group
from pyparallel.ops.sequence_ops import rank_by_rank
from pyparallel.ops.triton import linear_wgrad
from pyparallel.ops.triton._fused_linear import fused_reason as reason  # noqa: F401
from pyparallel.ops.triton._fused_linear import matmul_scatter


def run(
    grad: Tensor,
    x_shard_s: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx_shard_s and dw_shard_m, each where ``needs`` asks for it."""
    counts = [x_shard_s.shape[:-2].numel() * size for size in sizes]
    grad_x = grad_weight = None
    dy = rank_by_rank(grad, sizes)
    if needs[1]:
        x = x_shard_s.reshape(-1, x_shard_s.shape[-1])
        grad_weight = linear_wgrad.run(dy, all_gather_raw(x, group, sizes=counts))
    if needs[0]:
        grad_x = matmul_scatter(dy, weight.t(), None, group, counts).view(x_shard_s.shape)
    return grad_x, grad_weight
