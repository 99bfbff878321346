"""Replicated parameters that act on shards: each rank sees a part of their gradients.

    forward   w_1, w_2, ...
    backward  dw_i = all_reduce(dw_i of this rank's shard), all of them in one call

Communication: none forward, one all-reduce backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group


class _SumGradients(Function):
    @staticmethod
    def forward(ctx, group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = torch.cat([grad.reshape(-1) for grad in grads])
        summed = all_reduce_raw(packed, ctx.group).split([grad.numel() for grad in grads])
        return None, *(s.view_as(g) for s, g in zip(summed, grads, strict=True))


def with_summed_gradients(*parameters: Tensor | None, group: Group) -> tuple[Tensor | None, ...]:
    """The parameters themselves; their gradients are summed over the ranks, in one all-reduce.

    All must have one dtype. None stays None.
    """
    present = [p for p in parameters if p is not None]
    if group.size == 1 or not present:
        return parameters
    shared = iter(_SumGradients.apply(group, *present))
    return tuple(None if p is None else next(shared) for p in parameters)
