"""Collectives on tensors without autograd: along an axis, with uneven parts, counted.

``async_op=True`` returns a :class:`Pending` whose ``wait()`` gives the tensor. The pairs with autograd
are in :mod:`pyparallel.comm.collectives`. A group's engine moves the bytes, or, where a backend that has
kernels for that is asked for by name, those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.checks import check_reduction
from pyparallel.comm.communicator import Work
from pyparallel.comm.group import Group

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


def record_collective(name: str, num_bytes: int) -> None:
    """Count one; fused operations, which communicate by themselves, say here what they did."""
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


def _done(result: Tensor, async_op: bool) -> Tensor | Pending:
    """What a kernel gives, which runs on the caller's stream: there, or ordered before what follows."""
    return Pending(result, None) if async_op else result


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


def part_sizes_of(
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


def two_axes(x: Tensor, split_dim: int, join_dim: int) -> tuple[int, int]:
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
    check_reduction("all_reduce", op)
    if torch.compiler.is_compiling():
        result = x.contiguous()
        torch.ops.pyparallel.all_reduce_(result, op, group.handle)
        return Pending(result, None) if async_op else result
    record_collective("all_reduce", x.numel() * x.itemsize)
    result = x.contiguous()
    if (kernel := backend.offered("all_reduce", result, group, op)) is not None:
        return _done(kernel(result, group, op), async_op)
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
    parts = part_sizes_of("all_gather", x_shard, group, dim, sizes, whole=False)
    if torch.compiler.is_compiling():
        result = torch.ops.pyparallel.all_gather(x_shard, dim, parts, group.handle)
        return Pending(result, None) if async_op else result
    shapes = [[*x_shard.shape[:dim], size, *x_shard.shape[dim + 1 :]] for size in parts]
    counts = [_numel(shape) for shape in shapes]
    record_collective("all_gather", sum(counts) * x_shard.itemsize)
    source = x_shard.contiguous().view(-1)
    if (kernel := backend.offered("all_gather", source, group)) is not None:
        return _done(_join(kernel(source, group, counts=counts), shapes, dim), async_op)
    flat = x_shard.new_empty(sum(counts))
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
    parts = part_sizes_of("reduce_scatter", x, group, dim, sizes, whole=True)
    if torch.compiler.is_compiling():
        result = torch.ops.pyparallel.reduce_scatter(x, dim, parts, op, group.handle)
        return Pending(result, None) if async_op else result
    pieces = [piece.reshape(-1) for piece in x.split(parts, dim)]
    flat = torch.cat(pieces) if dim else x.contiguous().view(-1)
    shape = [*x.shape[:dim], parts[group.rank], *x.shape[dim + 1 :]]
    record_collective("reduce_scatter", x.numel() * x.itemsize)
    counts = [piece.numel() for piece in pieces]
    if (kernel := backend.offered("reduce_scatter", flat, group, op)) is not None:
        return _done(kernel(flat, group, op, counts=counts).view(shape), async_op)
    result = x.new_empty(shape)
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
    split_dim, join_dim = two_axes(x, split_dim, join_dim)
    sent = part_sizes_of("all_to_all", x, group, split_dim, split_sizes, whole=True)
    held = part_sizes_of("all_to_all", x, group, join_dim, join_sizes, whole=False)
    if torch.compiler.is_compiling():
        return torch.ops.pyparallel.all_to_all(x, split_dim, join_dim, sent, held, group.handle)
    pieces = [piece.reshape(-1) for piece in x.split(sent, split_dim)]
    shapes = []
    for size in held:
        shape = list(x.shape)
        shape[split_dim] = sent[group.rank]
        shape[join_dim] = size
        shapes.append(shape)
    counts = [_numel(shape) for shape in shapes]
    flat = x.new_empty(sum(counts))
    record_collective("all_to_all", x.numel() * x.itemsize)
    group.communicator.all_to_all(
        flat, torch.cat(pieces), output_counts=counts, input_counts=[p.numel() for p in pieces]
    )
    return _join(flat, shapes, join_dim)


def broadcast_raw(x: Tensor, group: Group, *, src: int = 0) -> Tensor:
    """Rank ``src``'s ``x`` on every rank, in place where ``x`` is contiguous."""
    result = x.contiguous()
    if torch.compiler.is_compiling():
        torch.ops.pyparallel.broadcast_(result, src, group.handle)
        return result
    record_collective("broadcast", x.numel() * x.itemsize)
    group.communicator.broadcast(result, src)
    return result
