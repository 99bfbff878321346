"""Which rank of each machine carries which elements between the machines.

Every machine cuts a slice over its own ranks, so machines of unlike sizes cut it at unlike places. A
lane is what lies between two neighbouring cuts of all machines: it has one carrier on each machine, and
a machine's ranks carry about as much each.

    machine 0, 2 ranks    0000000000001111111111111
    machine 1, 3 ranks    0000000011111111122222222
    lanes                 aaaaaaaabbbbccccddddddddd       a: 0 and 0, b: 0 and 1, c: 1 and 1, d: 1 and 2
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise

from pyparallel.cut.shares import part_sizes


@dataclass(frozen=True)
class Lane:
    """Elements ``start`` to ``stop`` of a slice; ``carriers[m]`` is the local rank on machine m."""

    start: int
    stop: int
    carriers: tuple[int, ...]


@lru_cache(maxsize=1024)
def carried(length: int, ranks: int, grain: int) -> list[int]:
    """How many of ``length`` elements each of a machine's ranks carries.

    Args:
        grain: elements that are worth a message of their own; shorter slices use fewer ranks.
    """
    used = max(1, min(ranks, length // grain))
    return part_sizes(length, used) + [0] * (ranks - used)


@lru_cache(maxsize=1024)
def lanes(length: int, ranks: tuple[int, ...], grain: int) -> tuple[Lane, ...]:
    """The lanes of ``length`` elements, in order, over machines of ``ranks[m]`` ranks."""
    ends = [list(accumulate(carried(length, count, grain))) for count in ranks]
    cuts = sorted({0, *chain.from_iterable(ends)})
    return tuple(
        Lane(start, stop, tuple(bisect_right(end, start) for end in ends))
        for start, stop in pairwise(cuts)
    )
