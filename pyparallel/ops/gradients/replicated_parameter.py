"""The gradient of a parameter of which several ranks hold replicas.

With fewer KV heads than ranks, a KV head's weights lie on several ranks, each of which sees only its
own query heads' gradients; the true gradient is the sum over the replicas.

    forward   w
    backward  dw[own rows] = (sum over ranks of dw, each at its dense rows)[own rows]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.cut.shard import Sharding


class _SumOverReplicas(Function):
    @staticmethod
    def forward(ctx, weight: Tensor, sharding: Sharding, group: Group, first_row: int) -> Tensor:
        ctx.saved = sharding, group, first_row
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sharding, group, first_row = ctx.saved
        # Fewer KV heads than ranks: the dense gradient is smaller than one rank's share of Q.
        dense = grad.new_zeros(sharding.length, *grad.shape[1:])
        held = sharding.ranges[group.rank]
        pieces = grad[first_row:].split([stop - start for start, stop in held])
        for (start, stop), piece in zip(held, pieces, strict=True):
            dense[start:stop] = piece
        summed = sharding.split(all_reduce_raw(dense, group), group.rank)
        return torch.cat([grad[:first_row], summed]), None, None, None


def sum_over_replicas(
    weight: Tensor, sharding: Sharding, group: Group, *, first_row: int = 0
) -> Tensor:
    """``weight`` itself; the gradients of its rows are summed over the ranks that hold the same ones.

    Args:
        sharding: which dense rows (axis 0) the rows from ``first_row`` on are, on every rank.
        first_row: the rows before it have one holder each and are left alone.
    """
    return _SumOverReplicas.apply(weight, sharding, group, first_row)
