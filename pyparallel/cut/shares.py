"""How much of an axis each rank gets: the one rule by which anything is cut over ranks.

Legend: U units, R ranks, s_r the share of rank r, a whole number above 0.

Rank r's ideal is ``U s_r / sum(s)`` units. It gets that rounded down; the units left over go, one a
rank, to those with the largest remainders, to the first of equals. So every rank holds within one unit
of its ideal, and equal shares hold U // R each, the first U % R one more. Where there are as many units
as ranks, none is left without: a rank whose ideal is less than one unit gets one, and those farthest
above their ideals give it.

Source: Balinski and Young 1982, "Fair Representation", the method of largest remainders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyparallel.limits import check_count

# The shares of all ranks of an axis, in their order.
Shares = tuple[int, ...]
# How many equal parts, or the parts' shares.
Parts = int | Sequence[int]

# More than any two devices differ by; products with lengths stay far below what anything overflows at.
MAX_SHARE = 1_000_000


def check_shares(name: str, shares: object, ranks: int) -> Shares:
    """``shares`` in lowest terms, one for each of ``ranks`` ranks; the ValueError names it otherwise.

    >>> check_shares("shares", (4, 2), 2)
    (2, 1)
    """
    if not isinstance(shares, Sequence) or isinstance(shares, (str, bytes)):
        raise ValueError(f"{name}: expected a whole number for each rank, got {shares!r:.60}")
    if len(shares) != ranks:
        raise ValueError(
            f"{name}: expected {ranks}, one for each rank of tp={ranks}, got {len(shares)}"
        )
    told = [
        check_count(f"{name} of rank {rank}", share, MAX_SHARE) for rank, share in enumerate(shares)
    ]
    common = math.gcd(*told)
    return tuple(share // common for share in told)


def shares_of(parts: Parts) -> Shares:
    """Each part's share."""
    return (1,) * parts if isinstance(parts, int) else tuple(parts)


def are_equal(parts: Parts) -> bool:
    """Whether all parts have the same share."""
    return isinstance(parts, int) or len(set(parts)) <= 1


def part_sizes(length: int, parts: Parts, *, unit: int = 1) -> list[int]:
    """Sizes of the parts of ``length``, each a multiple of ``unit`` but for the last of the axis.

    >>> part_sizes(10, 4)
    [3, 3, 2, 2]
    >>> part_sizes(10, (3, 1))
    [8, 2]
    >>> part_sizes(3, (9, 9, 1))
    [1, 1, 1]
    """
    count = parts if isinstance(parts, int) else len(parts)
    if length < 0 or count < 1 or unit < 1:
        raise ValueError(
            f"part_sizes: expected length >= 0, parts >= 1, unit >= 1; got {length}, {parts}, {unit}"
        )
    units = -(-length // unit)
    if are_equal(parts):
        base, more = divmod(units, count)
        held = [base + (rank < more) for rank in range(count)]
    else:
        held = _largest_remainders(units, shares_of(parts))
    sizes, start = [], 0
    for number in held:
        stop = min(length, start + unit * number)
        sizes.append(stop - start)
        start = stop
    return sizes


def _largest_remainders(units: int, shares: Shares) -> list[int]:
    total, ranks = sum(shares), range(len(shares))
    least = 1 if units >= len(shares) else 0
    held = [max(least, units * share // total) for share in shares]

    def missing(rank: int) -> int:
        """By how much a rank is below its ideal, in units of 1 / total, so that it is exact."""
        return units * shares[rank] - held[rank] * total

    while sum(held) < units:
        held[max(ranks, key=missing)] += 1
    while sum(held) > units:
        # Of equals the last gives, as the first gets.
        held[min((r for r in reversed(ranks) if held[r] > least), key=missing)] -= 1
    return held


def runs(groups: int, parts: Parts, *, most: int) -> list[int]:
    """Cut the parts into ``groups`` runs of neighbours of nearly equal shares: the run of each part.

    Run g begins at the first part that has g / groups of all shares before it, moved where a run would
    be empty or longer than ``most``. With equal shares part r is in run ``r * groups // R``.

    >>> runs(2, (5, 3, 1), most=4)
    [0, 1, 1]
    >>> runs(2, (1, 3, 5), most=4)
    [0, 0, 1]
    """
    shares = shares_of(parts)
    count, total = len(shares), sum(shares)
    before = [sum(shares[:part]) for part in range(count)]
    starts = [0]
    for group in range(1, groups):
        wished = next((p for p in range(count) if before[p] * groups >= group * total), count)
        left = groups - group
        earliest = max(starts[-1] + 1, count - left * most)
        latest = min(starts[-1] + most, count - left)
        starts.append(max(earliest, min(latest, wished)))
    return [max(g for g in range(groups) if starts[g] <= part) for part in range(count)]
