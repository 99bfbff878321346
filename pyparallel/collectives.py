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

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import Function

from pyparallel.communicator import REDUCTIONS, Work
from pyparallel.group import Group

_counters: list[Counter] = []


@contextmanager
def count_collectives() -> Iterator[Counter]:
    """Count this rank's collectives inside the block: ``counter[name]`` calls, ``[name, "bytes"]``.

    Bytes are those of the dense side: the reduced tensor, or the gathered one.
    """
    counter: Counter = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(name: str, num_bytes: int) -> None:
    for counter in _counters:
        counter[name] += 1
        counter[name, "bytes"] += num_bytes


class Pending:
    """The result of a collective under way."""

    def __init__(self, result: Tensor, work: Work | None) -> None:
        self._result = result
        self._work = work

    def wait(self) -> Tensor:
        """The result, when it is there."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


class _Gathered(Pending):
    """Gathered shards that still lie one after another, to be joined along their axis."""

    def __init__(self, flat: Tensor, work: Work | None, shapes: list[list[int]], dim: int) -> None:
        super().__init__(flat, work)
        self._shapes = shapes
        self._dim = dim

    def wait(self) -> Tensor:
        return _join(super().wait(), self._shapes, self._dim)


def _join(flat: Tensor, shapes: list[list[int]], dim: int) -> Tensor:
    """Tensors that lie one after another in ``flat``, joined along ``dim``."""
    if all(size == 1 for size in shapes[0][:dim]):
        joined = list(shapes[0])
        joined[dim] = sum(shape[dim] for shape in shapes)
        return flat.view(joined)
    pieces = flat.split([_numel(shape) for shape in shapes])
    return torch.cat([piece.view(s) for piece, s in zip(pieces, shapes, strict=True)], dim)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _sizes(
    what: str, x: Tensor, group: Group, dim: int, sizes: Sequence[int] | None, *, whole: bool
) -> list[int]:
    """The sizes of all ranks' parts of axis ``dim``; ``x`` is the whole, or this rank's part."""
    length = x.shape[dim]
    if sizes is None:
        if whole and length % group.size:
            raise ValueError(
                f"{what}: axis {dim} of length {length} does not divide by {group.size} ranks; "
                f"give the parts' sizes="
            )
        return [length // group.size if whole else length] * group.size
    if len(sizes) != group.size or (sum(sizes) if whole else sizes[group.rank]) != length:
        raise ValueError(
            f"{what}: sizes {list(sizes)} do not fit axis {dim} of length {length} "
            f"on rank {group.rank} of {group.size}"
        )
    return list(sizes)


def _two_axes(x: Tensor, split_dim: int, join_dim: int) -> tuple[int, int]:
    axes = split_dim % x.dim(), join_dim % x.dim()
    if axes[0] == axes[1]:
        raise ValueError(f"join_dim: expected another axis than split_dim={axes[0]}")
    return axes


def all_reduce_raw(
    x: Tensor, group: Group, *, op: str = "sum", async_op: bool = False
) -> Tensor | Pending:
    """The reduction of ``x`` over the group's ranks, in place where ``x`` is contiguous.

    Sums are taken in rank order in fp32 and rounded once: all ranks get the same bits.
    """
    if op not in REDUCTIONS:
        raise ValueError(f"op: expected one of {', '.join(REDUCTIONS)}, got {op!r}")
    _count("all_reduce", x.numel() * x.itemsize)
    result = x.contiguous()
    work = group.communicator.all_reduce(result, op=op, async_op=async_op)
    return Pending(result, work) if async_op else result


def all_gather_raw(
    x_shard: Tensor,
    group: Group,
    *,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    async_op: bool = False,
) -> Tensor | Pending:
    """The ranks' shards joined along ``dim``, in rank order. ``sizes``: all parts, where uneven."""
    dim %= x_shard.dim()
    parts = _sizes("all_gather", x_shard, group, dim, sizes, whole=False)
    shapes = [[*x_shard.shape[:dim], size, *x_shard.shape[dim + 1 :]] for size in parts]
    counts = [_numel(shape) for shape in shapes]
    flat = x_shard.new_empty(sum(counts))
    _count("all_gather", flat.numel() * flat.itemsize)
    source = x_shard.contiguous().view(-1)
    work = group.communicator.all_gather(flat, source, counts=counts, async_op=async_op)
    pending = _Gathered(flat, work, shapes, dim)
    return pending if async_op else pending.wait()


def reduce_scatter_raw(
    x: Tensor,
    group: Group,
    *,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    op: str = "sum",
    async_op: bool = False,
) -> Tensor | Pending:
    """This rank's part along ``dim`` of the reduction of ``x`` over the ranks."""
    dim %= x.dim()
    parts = _sizes("reduce_scatter", x, group, dim, sizes, whole=True)
    pieces = [piece.reshape(-1) for piece in x.split(parts, dim)]
    flat = torch.cat(pieces) if dim else x.contiguous().view(-1)
    shape = [*x.shape[:dim], parts[group.rank], *x.shape[dim + 1 :]]
    result = x.new_empty(shape)
    _count("reduce_scatter", x.numel() * x.itemsize)
    counts = [piece.numel() for piece in pieces]
    work = group.communicator.reduce_scatter(
        result.view(-1), flat, counts=counts, op=op, async_op=async_op
    )
    return Pending(result, work) if async_op else result


def all_to_all_raw(
    x: Tensor,
    group: Group,
    *,
    split_dim: int,
    join_dim: int,
    split_sizes: Sequence[int] | None = None,
    join_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Send part r of ``split_dim`` to rank r; join what arrives along ``join_dim``."""
    split_dim, join_dim = _two_axes(x, split_dim, join_dim)
    sent = _sizes("all_to_all", x, group, split_dim, split_sizes, whole=True)
    held = _sizes("all_to_all", x, group, join_dim, join_sizes, whole=False)
    pieces = [piece.reshape(-1) for piece in x.split(sent, split_dim)]
    shapes = []
    for size in held:
        shape = list(x.shape)
        shape[split_dim] = sent[group.rank]
        shape[join_dim] = size
        shapes.append(shape)
    counts = [_numel(shape) for shape in shapes]
    flat = x.new_empty(sum(counts))
    _count("all_to_all", x.numel() * x.itemsize)
    group.communicator.all_to_all(
        flat, torch.cat(pieces), output_counts=counts, input_counts=[p.numel() for p in pieces]
    )
    return _join(flat, shapes, join_dim)


def broadcast_raw(x: Tensor, group: Group, *, src: int = 0) -> Tensor:
    """Rank ``src``'s ``x`` on every rank, in place where ``x`` is contiguous."""
    _count("broadcast", x.numel() * x.itemsize)
    result = x.contiguous()
    group.communicator.broadcast(result, src)
    return result


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
        parts = _sizes("all_gather", x_shard, group, dim, sizes, whole=False)
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
        ctx.saved = group, dim, _sizes("reduce_scatter", x, group, dim, sizes, whole=True)
        return reduce_scatter_raw(x, group, dim=dim, sizes=ctx.saved[2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        group, dim, parts = ctx.saved
        return all_gather_raw(grad, group, dim=dim, sizes=parts), None, None, None


class _Split(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, dim: int, sizes) -> Tensor:
        dim %= x.dim()
        ctx.saved = group, dim, _sizes("split", x, group, dim, sizes, whole=True)
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
        split_dim, join_dim = _two_axes(x, split_dim, join_dim)
        sent = _sizes("all_to_all", x, group, split_dim, split_sizes, whole=True)
        held = _sizes("all_to_all", x, group, join_dim, join_sizes, whole=False)
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


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """``x`` itself; the gradients of all ranks are summed. For a replicated input of sharded work."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)


def all_reduce(x: Tensor, group: Group, *, op: str = "sum") -> Tensor:
    """The reduction of ``x`` over the ranks, replicated; its gradient, replicated too, passes as is.

    Raises:
        ValueError: ``x`` needs a gradient and ``op`` is not "sum"; only a sum has one here.
    """
    if op != "sum" and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"op: expected 'sum' for a tensor that needs a gradient, got {op!r}")
    return x if group.size == 1 else _AllReduce.apply(x, group, op)


def all_gather(
    x_shard: Tensor,
    group: Group,
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
    return x_shard if group.size == 1 else _AllGather.apply(x_shard, group, dim, sizes, grad)


def reduce_scatter(
    x: Tensor, group: Group, *, dim: int = 0, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part along ``dim`` of the sum of ``x`` over the ranks."""
    return x if group.size == 1 else _ReduceScatter.apply(x, group, dim, sizes)


def split(x: Tensor, group: Group, *, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part along ``dim`` of a replicated ``x``; no communication until backward."""
    return x if group.size == 1 else _Split.apply(x, group, dim, sizes)


def all_to_all(
    x: Tensor,
    group: Group,
    *,
    split_dim: int,
    join_dim: int,
    split_sizes: Sequence[int] | None = None,
    join_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Shards of ``join_dim`` become shards of ``split_dim``: Ulysses' exchange of sequence and heads.

    Source: Jacobs et al. 2023, "DeepSpeed Ulysses", section 3.
    """
    if group.size == 1:
        return x
    return _AllToAll.apply(x, group, split_dim, join_dim, split_sizes, join_sizes)
