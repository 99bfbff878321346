"""Which boxes of which dense tensors a rank holds: what a sharded checkpoint is written and read by.

A parameter is cut twice at most: over the tensor-parallel ranks, in ranges of one axis of the dense
tensors it is made of (:class:`Source`), and by FSDP, in a box of what tensor parallelism left. A piece
is what remains: a box of one dense tensor, and the view of local memory that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from pyparallel.cut.shard import Range, Sharding
from pyparallel.models.weights import Source


@dataclass(frozen=True)
class Piece:
    """A box of a dense tensor, held by this rank.

    Attributes:
        name: the dense tensor.
        shape: the dense tensor's.
        offsets: where the box begins in it; its sizes are those of ``tensor``.
        tensor: a view of this rank's memory, laid out as the dense tensor is.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor


def pieces_of(
    value: Tensor, found: Sequence[Source], rank: int, *, owned: bool, prefix: str = ""
) -> Iterator[Piece]:
    """The pieces of a parameter, or of a tensor that is cut as it is.

    Args:
        value: this rank's shard; a DTensor is one that FSDP has cut once more.
        found: what it is made of, one after another along its axis 0.
        rank: in the tensor-parallel group.
        owned: leave out the ranges that an earlier rank holds too, so that the pieces of different
            ranks are equal or do not overlap.
        prefix: of the dense tensors' names.
    """
    yield from pieces_at(*_local(value), value.shape, found, rank, owned=owned, prefix=prefix)


def pieces_at(
    local: Tensor,
    begin: Sequence[int],
    whole: Sequence[int],
    found: Sequence[Source],
    rank: int,
    *,
    owned: bool,
    prefix: str = "",
) -> Iterator[Piece]:
    """:func:`pieces_of` a shard of shape ``whole``, of which the box ``local`` at ``begin`` is here."""
    filled = 0
    for source in found:
        sharding, shape = source.sharding, list(whole)
        # The axes of the parameter, in the order in which the dense tensor is stored.
        order = range(len(shape))[:: -1 if source.transposed else 1]
        axis = None if sharding.dim is None else order[sharding.dim]
        dense = [shape[i] if i != axis else sharding.length for i in order]
        if axis is not None:
            shape[axis] = sharding.sizes[rank]
        for start, stop, position in _ranges(sharding, rank, owned):
            # For each axis of the parameter: the piece's first index, its size, the dense first index.
            box = [(0, size, 0) for size in shape]
            if axis is not None:
                box[axis] = (position, stop - start, start)
            if box:
                first, *others = box
                box = [(first[0] + filled, *first[1:]), *others]
            clipped = [
                _clip(*side, low, size)
                for side, low, size in zip(box, begin, local.shape, strict=True)
            ]
            if all(size > 0 for _, size, _ in clipped):
                view = local[tuple(slice(low, low + size) for low, size, _ in clipped)]
                yield Piece(
                    prefix + source.name,
                    tuple(dense),
                    tuple(clipped[i][2] for i in order),
                    view.t() if source.transposed else view,
                )
        filled += shape[0] if shape else 0


def _clip(first: int, size: int, dense: int, low: int, held: int) -> tuple[int, int, int]:
    """A side of a box, of which ``held`` indices from ``low`` on are here; its first index here."""
    start, stop = max(first, low), min(first + size, low + held)
    return start - low, stop - start, dense + start - first


def _local(value: Tensor) -> tuple[Tensor, Sequence[int]]:
    """What of a tensor is in this process, and where it begins."""
    value = value.detach()
    if isinstance(value, DTensor):
        # The protocol by which torch.distributed.checkpoint asks a DTensor for its box.
        (chunk,) = value.__create_chunk_list__()
        return value.to_local(), tuple(chunk.offsets)
    return value, (0,) * value.dim()


def _ranges(sharding: Sharding, rank: int, owned: bool) -> list[tuple[int, int, int]]:
    """(start, stop, where it begins on the rank) of each range that a rank holds, or owns."""
    if sharding.dim is None:
        return [(0, 0, 0)]
    earlier: list[Range] = [held for ranges in sharding.ranges[:rank] for held in ranges]
    found, position = [], 0
    for start, stop in sharding.ranges[rank]:
        parts = [(start, stop)]
        for other in earlier if owned else ():
            parts = [part for whole in parts for part in _without(whole, other)]
        found += [(a, b, position + a - start) for a, b in parts]
        position += stop - start
    return found


def _without(whole: Range, other: Range) -> list[Range]:
    """What is left of a range without what another covers."""
    sides = (whole[0], min(whole[1], other[0])), (max(whole[0], other[1]), whole[1])
    return [(start, stop) for start, stop in sides if start < stop]
