"""How tensors are cut over ranks, and put together again.

A :class:`Sharding` lists, for every rank, the ranges of one axis that it holds. That one form covers
uneven parts, fused projections (several ranges a rank) and replicated KV heads (the same range on
several ranks), so splitting, joining, loading slices from a file and initialising are written once.

Sizes are cut into units, which :mod:`pyparallel.cut.shares` deals out: equally, or by the ranks' shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel.cut.shares import Parts, part_sizes, runs, shares_of

Range = tuple[int, int]

# Matmul shards are cut in grains of this many columns where the size allows: a quantisation block of
# the common GGUF types, and two cache lines of fp32.
GRAIN = 32


def grain_for(length: int, parts: Parts) -> int:
    """The largest power of two up to GRAIN that still gives every part a unit."""
    grain, count = GRAIN, len(shares_of(parts))
    while grain > 1 and length < grain * count:
        grain //= 2
    return grain


@dataclass(frozen=True)
class Sharding:
    """Which ranges of axis ``dim``, of ``length`` indices in all, each rank holds.

    Attributes:
        dim: the axis that is cut; ``None``: every rank holds the whole tensor.
        length: the dense size of that axis.
        ranges: ``ranges[rank]`` = (start, stop) pairs in the order in which the rank stores them.
    """

    dim: int | None
    length: int = 0
    ranges: tuple[tuple[Range, ...], ...] = ()

    @property
    def sizes(self) -> list[int]:
        """The local size of the axis on each rank."""
        return [sum(stop - start for start, stop in held) for held in self.ranges]

    @property
    def in_order(self) -> bool:
        """Whether the ranks' parts, one after another, are the dense axis."""
        held = [piece for ranges in self.ranges for piece in ranges]
        stops = [0, *(stop for _, stop in held)]
        return all(start == stop for (start, _), stop in zip(held, stops, strict=False))

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of rank's shard of a tensor of ``shape``."""
        if self.dim is None:
            return tuple(shape)
        self._check(shape)
        local = list(shape)
        local[self.dim] = self.sizes[rank]
        return tuple(local)

    def split(self, tensor: Tensor, rank: int) -> Tensor:
        """Rank's shard of a dense tensor, as a copy of its own."""
        if self.dim is None:
            return tensor.clone()
        self._check(tensor.shape)
        parts = [tensor.narrow(self.dim, a, b - a) for a, b in self.ranges[rank]]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The dense tensor of all ranks' shards; of a replicated range, the first rank's copy."""
        if self.dim is None:
            return shards[0].clone()
        if len(shards) != len(self.ranges):
            raise ValueError(f"join: expected {len(self.ranges)} shards, got {len(shards)}")
        shape = list(shards[0].shape)
        shape[self.dim] = self.length
        dense = shards[0].new_empty(shape)
        for held, shard in reversed(list(zip(self.ranges, shards, strict=True))):
            lengths = [stop - start for start, stop in held]
            for (start, stop), piece in zip(held, shard.split(lengths, self.dim), strict=True):
                dense.narrow(self.dim, start, stop - start).copy_(piece)
        return dense

    def first_held(self, rank: int) -> list[Range]:
        """Which places of rank's shard no lower rank holds too: ranges along the local axis.

        >>> Sharding(0, 4, (((0, 2),), ((0, 4),))).first_held(1)
        [(2, 4)]
        """
        before = sorted(piece for held in self.ranges[:rank] for piece in held)
        found, offset = [], 0
        for start, stop in self.ranges[rank]:
            place = start
            for low, high in before:
                if place < min(low, stop):
                    found.append((offset + place - start, offset + min(low, stop) - start))
                place = max(place, min(high, stop))
            if place < stop:
                found.append((offset + place - start, offset + stop - start))
            offset += stop - start
        return found

    def along(self, dim: int) -> Sharding:
        """The same ranges along another axis."""
        return Sharding(dim, self.length, self.ranges)

    def _check(self, shape: Sequence[int]) -> None:
        if shape[self.dim] != self.length:
            raise ValueError(
                f"shard: axis {self.dim} of a tensor of shape {tuple(shape)} should have length "
                f"{self.length}"
            )


REPLICATED = Sharding(None)


def even_parts(length: int, parts: Parts, *, unit: int = 1, dim: int = 0) -> Sharding:
    """One contiguous range a rank, nearly equal or by its share."""
    ranges, start = [], 0
    for size in part_sizes(length, parts, unit=unit):
        ranges.append(((start, start + size),))
        start += size
    return Sharding(dim, length, tuple(ranges))


def features(length: int, parts: Parts, *, dim: int = 0) -> Sharding:
    """The cut of a hidden or intermediate axis, in grains."""
    return even_parts(length, parts, unit=grain_for(length, parts), dim=dim)


def fuse(*shardings: Sharding) -> Sharding:
    """The sharding of tensors stored one after another along their common axis (QKV, gate-up)."""
    dim = shardings[0].dim
    ranges: list[list[Range]] = [[] for _ in shardings[0].ranges]
    offset = 0
    for sharding in shardings:
        for held, more in zip(ranges, sharding.ranges, strict=True):
            held.extend((start + offset, stop + offset) for start, stop in more)
        offset += sharding.length
    return Sharding(dim, offset, tuple(tuple(held) for held in ranges))


@dataclass(frozen=True)
class HeadLayout:
    """Which query and KV heads each rank holds.

    The unit is a KV group: a KV head with the ``num_heads // num_kv_heads`` query heads that read
    it. With fewer KV heads than ranks, a run of neighbouring ranks holds replicas of one KV head
    (:func:`pyparallel.cut.shares.runs`; of equal shares rank r that of ``r * num_kv_heads // R``), and
    the group's query heads are cut over the run.

    Attributes:
        query, kv: ``query[rank]`` and ``kv[rank]`` are (start, stop) in heads.
    """

    num_heads: int
    num_kv_heads: int
    query: tuple[Range, ...]
    kv: tuple[Range, ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, parts: Parts) -> HeadLayout:
        """The layout over ``parts`` ranks, or over ranks of these shares.

        Raises:
            ValueError: the KV heads do not divide the heads, or a rank would hold no query head.
        """
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}"
            )
        shares = shares_of(parts)
        if len(shares) > num_heads:
            raise ValueError(
                f"tp={len(shares)} is more than {num_heads} heads in {num_kv_heads} KV groups can be "
                f"cut into; use at most tp={num_heads}"
            )
        group = num_heads // num_kv_heads
        if num_kv_heads >= len(shares):
            kv = [held[0] for held in even_parts(num_kv_heads, shares).ranges]
            query = [(start * group, stop * group) for start, stop in kv]
        else:
            owner = runs(num_kv_heads, shares, most=group)
            kv = [(head, head + 1) for head in owner]
            query = []
            for head in range(num_kv_heads):
                own = [share for share, held in zip(shares, owner, strict=True) if held == head]
                for size in part_sizes(group, own):
                    start = query[-1][1] if query else 0
                    query.append((start, start + size))
        return cls(num_heads, num_kv_heads, tuple(query), tuple(kv))

    @property
    def replicated(self) -> bool:
        """Whether some KV head is held by more than one rank."""
        return len(set(self.kv)) < len(self.kv)

    def query_sharding(self, head_dim: int, *, dim: int = 0) -> Sharding:
        """The rows of the query projection (or the columns of the output projection)."""
        return _head_ranges(self.query, self.num_heads, head_dim, dim)

    def kv_sharding(self, head_dim: int, *, dim: int = 0) -> Sharding:
        """The rows of the key or the value projection."""
        return _head_ranges(self.kv, self.num_kv_heads, head_dim, dim)

    def qkv_sharding(self, head_dim: int, *, dim: int = 0) -> Sharding:
        """The rows of one projection that stores all queries, then all keys, then all values."""
        kv = self.kv_sharding(head_dim, dim=dim)
        return fuse(self.query_sharding(head_dim, dim=dim), kv, kv)


def _head_ranges(heads: Sequence[Range], num_heads: int, head_dim: int, dim: int) -> Sharding:
    ranges = tuple(((start * head_dim, stop * head_dim),) for start, stop in heads)
    return Sharding(dim, num_heads * head_dim, ranges)
