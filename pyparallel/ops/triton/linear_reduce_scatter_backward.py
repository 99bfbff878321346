"""The gradients of ``linear_reduce_scatter`` on Triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group import Group
from pyparallel.ops.linear import bias_grad
from pyparallel.ops.sequence_ops import join_tokens, rank_by_rank
from pyparallel.ops.triton import linear_wgrad
from pyparallel.ops.triton._fused_linear import fused_reason as reason  # noqa: F401
from pyparallel.ops.triton._fused_linear import gather_matmul


def run(
    grad: Tensor,
    x_shard_k: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx_shard_k, dw_shard_k and db, each where ``needs`` asks for it."""
    lead = grad.shape[:-2]
    counts = [lead.numel() * size for size in sizes]
    own = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = None
    if needs[0]:
        dx, dy = gather_matmul(own, weight.t(), None, group, counts)
        grad_x = join_tokens(dx, lead, sizes)
    else:
        dy = all_gather_raw(own, group, sizes=counts)
    if needs[1]:
        grad_weight = linear_wgrad.run(dy, rank_by_rank(x_shard_k, sizes))
    return grad_x, grad_weight, bias_grad(dy) if needs[2] else None
