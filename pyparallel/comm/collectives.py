"""Collectives on tensors: along an axis, with uneven parts, counted, raw or with autograd.

Raw (``*_raw``): no autograd; ``async_op=True`` returns a :class:`Pending` whose ``wait()`` gives the
tensor. With autograd, each function below is one of a pair whose backward is the other:

    ====================  ==========================  =========================================
    forward               backward                    use
    ====================  ==========================  =========================================
    ``copy_to_group``     all-reduce                  a replicated input enters sharded work
    ``all_reduce``        identity                    partial results become a replicated one
    ``all_gather``        reduce-scatter              shards enter work that differs by rank
    ``all_gather(grad=    own part                    shards enter work that is replicated
    "split")``
    ``reduce_scatter``    all-gather                  partial results become shards
    ``split``             all-gather                  a replicated tensor becomes shards
    ``all_to_all``        all-to-all, reversed        the axis that is sharded changes
    ====================  ==========================  =========================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

import pyparallel.comm.compiled  # noqa: F401 (registers what torch.compile calls)
from pyparallel.comm.group import Group
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.comm.raw import (
    Pending,
    all_gather_raw,
    all_reduce_raw,
    all_to_all_raw,
    broadcast_raw,
    count_collectives,
    part_sizes_of,
    record_collective,
    reduce_scatter_raw,
    two_axes,
)

__all__ = [
    "Pending",
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "all_to_all",
    "all_to_all_raw",
    "broadcast_raw",
    "copy_to_group",
    "count_collectives",
    "record_collective",
    "reduce_scatter",
    "reduce_scatter_raw",
    "split",
]


class _CopyToGroup(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_raw(grad.clone(), ctx.group), None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, op: str) -> Tensor:
        return all_reduce_raw(x.clone(), group, op=op)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx, x_shard: Tensor, group: Group, dim: int, sizes, grad_mode: str) -> Tensor:
        dim %= x_shard.dim()
        parts = part_sizes_of("all_gather", x_shard, group, dim, sizes, whole=False)
        ctx.saved = group, dim, parts, grad_mode
        return all_gather_raw(x_shard, group, dim=dim, sizes=parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        group, dim, parts, grad_mode = ctx.saved
        if grad_mode == "split":
            own = grad.split(parts, dim)[group.rank]
        else:
            own = reduce_scatter_raw(grad, group, dim=dim, sizes=parts)
        return own, None, None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, dim: int, sizes) -> Tensor:
        dim %= x.dim()
        ctx.saved = group, dim, part_sizes_of("reduce_scatter", x, group, dim, sizes, whole=True)
        return reduce_scatter_raw(x, group, dim=dim, sizes=ctx.saved[2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        group, dim, parts = ctx.saved
        return all_gather_raw(grad, group, dim=dim, sizes=parts), None, None, None


class _Split(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, dim: int, sizes) -> Tensor:
        dim %= x.dim()
        ctx.saved = group, dim, part_sizes_of("split", x, group, dim, sizes, whole=True)
        return x.split(ctx.saved[2], dim)[group.rank].contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        group, dim, parts = ctx.saved
        return all_gather_raw(grad, group, dim=dim, sizes=parts), None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, group: Group, split_dim: int, join_dim: int, split_sizes, join_sizes
    ) -> Tensor:
        split_dim, join_dim = two_axes(x, split_dim, join_dim)
        sent = part_sizes_of("all_to_all", x, group, split_dim, split_sizes, whole=True)
        held = part_sizes_of("all_to_all", x, group, join_dim, join_sizes, whole=False)
        ctx.saved = group, split_dim, join_dim, sent, held
        return all_to_all_raw(
            x, group, split_dim=split_dim, join_dim=join_dim, split_sizes=sent, join_sizes=held
        )

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        group, split_dim, join_dim, sent, held = ctx.saved
        back = all_to_all_raw(
            grad, group, split_dim=join_dim, join_dim=split_dim, split_sizes=held, join_sizes=sent
        )
        return back, None, None, None, None, None


def copy_to_group(x: Tensor, group: GroupLike) -> Tensor:
    """``x`` itself; the gradients of all ranks are summed. For a replicated input of sharded work."""
    group = group_of(group)
    return x if group.size == 1 else _CopyToGroup.apply(x, group)


def all_reduce(x: Tensor, group: GroupLike, *, op: str = "sum") -> Tensor:
    """The reduction of ``x`` over the ranks, replicated; its gradient, replicated too, passes as is.

    Raises:
        ValueError: ``x`` needs a gradient and ``op`` is not "sum"; only a sum has one here.
    """
    if op != "sum" and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"op: expected 'sum' for a tensor that needs a gradient, got {op!r}")
    group = group_of(group)
    return x if group.size == 1 else _AllReduce.apply(x, group, op)


def all_gather(
    x_shard: Tensor,
    group: GroupLike,
    *,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    grad: str = "reduce_scatter",
) -> Tensor:
    """The ranks' shards joined along ``dim``.

    Args:
        sizes: the parts of all ranks along ``dim``, where they are uneven.
        grad: "reduce_scatter" where each rank makes its own use of the result, so that its gradients
            must be summed; "split" where the use is replicated and the gradients are equal.
    """
    if grad not in ("reduce_scatter", "split"):
        raise ValueError(f"grad: expected 'reduce_scatter' or 'split', got {grad!r}")
    group = group_of(group)
    return x_shard if group.size == 1 else _AllGather.apply(x_shard, group, dim, sizes, grad)


def reduce_scatter(
    x: Tensor, group: GroupLike, *, dim: int = 0, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part along ``dim`` of the sum of ``x`` over the ranks."""
    group = group_of(group)
    return x if group.size == 1 else _ReduceScatter.apply(x, group, dim, sizes)


def split(
    x: Tensor, group: GroupLike, *, dim: int = 0, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part along ``dim`` of a replicated ``x``; no communication until backward."""
    group = group_of(group)
    return x if group.size == 1 else _Split.apply(x, group, dim, sizes)


def all_to_all(
    x: Tensor,
    group: GroupLike,
    *,
    split_dim: int,
    join_dim: int,
    split_sizes: Sequence[int] | None = None,
    join_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Shards of ``join_dim`` become shards of ``split_dim``: Ulysses' exchange of sequence and heads.

    Source: Jacobs et al. 2023, "DeepSpeed Ulysses", section 3.
    """
    group = group_of(group)
    if group.size == 1:
        return x
    return _AllToAll.apply(x, group, split_dim, join_dim, split_sizes, join_sizes)
