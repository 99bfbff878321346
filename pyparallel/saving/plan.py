"""Which rank writes which box: worked out alike by every rank, from what all of them hold.

Tensors that the same ranks hold in the same boxes are planned as one, so the time grows with the ranks
and with the tensors, and not with both together.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from pyparallel.checkpoint.boxes import Stored, check_cover
from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.grid import Box, Chunk, Grid, grid_of
from pyparallel.checkpoint.storage import file_name
from pyparallel.saving.told import Kind, ToldBoxes, boxes_of


@dataclass(frozen=True)
class Cut:
    """Tensors that are cut alike, and written by the same ranks.

    Attributes:
        shape: of each of them.
        boxes: all of a tensor's, sorted by their offsets.
        writers: the rank that writes each box.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    writers: tuple[int, ...]


def plan(
    lists: Sequence[Sequence[Kind]], told: Sequence[tuple[int, ToldBoxes]], what: str = ""
) -> list[Cut]:
    """What is written of the tensors that ranks hold, and by whom; of equal boxes one is.

    Args:
        lists: the different lists of kinds.
        told: for each rank the number of its list, and its boxes of each kind.
        what: is written, for errors.

    Raises:
        CheckpointError: ranks hold a tensor in different shapes or dtypes, or not all of it.
    """
    ranks: list[list[int]] = [[] for _ in lists]
    for rank, (number, _) in enumerate(told):
        ranks[number].append(rank)
    load = [0] * len(told)
    cuts = []
    for names, kinds in _alike(lists):
        first = lists[kinds[0][0]][kinds[0][1]]
        for number, place in kinds[1:]:
            other = lists[number][place]
            if other[:2] != first[:2]:
                raise CheckpointError(
                    f"{what}: tensor {names[0]} is {first.shape} of {first.dtype} on rank "
                    f"{ranks[kinds[0][0]][0]}, and {other.shape} of {other.dtype} on rank "
                    f"{ranks[number][0]}"
                )
        holders: dict[Box, list[int]] = defaultdict(list)
        for number, place in kinds:
            for rank in ranks[number]:
                for box in boxes_of(first, told[rank][1][place]):
                    holders[box].append(rank)
        cuts += _shared_out(first, names, dict(sorted(holders.items())), load)
    return cuts


def written_by(rank: int, cuts: Sequence[Cut]) -> Iterator[tuple[str, Box]]:
    """The boxes that a rank writes, in the order in which it does."""
    for cut in cuts:
        own = [box for box, writer in zip(cut.boxes, cut.writers, strict=True) if writer == rank]
        yield from itertools.product(cut.names, own)


def stored(
    cuts: Sequence[Cut], written: Sequence[Sequence[tuple[int, int]]], suffix: str, what: str
) -> tuple[dict[str, Stored], dict[str, int]]:
    """The tensors of an index and the bytes of its files, by their names.

    Args:
        written: for each rank and each file of it the number of its boxes, and its bytes.
        suffix: of the files' names.
        what: is written, for errors.

    Raises:
        CheckpointError: the boxes of a tensor are not all of it.
    """
    files: dict[str, int] = {}
    # For each rank: the number of its first file, and up to which of its boxes each file goes.
    begins, ends = [], []
    for rank, sizes in enumerate(written):
        begins.append(len(files))
        ends.append(list(itertools.accumulate(count for count, _ in sizes)))
        files |= {file_name(rank, i, suffix): size for i, (_, size) in enumerate(sizes)}
    names = list(files)
    position = [0] * len(written)
    tensors: dict[str, Stored] = {}
    grids: dict[tuple, Grid] = {}
    for whole in cuts:
        edges = grid_of(whole.shape, whole.boxes)
        for cut, cells in _by_files(whole, begins, ends, position):
            if edges is None:
                sides = zip(cells, cut.boxes, strict=True)
                chunks = tuple(Chunk(names[cell], *box) for cell, box in sides)
            else:
                grid = Grid(edges, cells, names)
                chunks = grids.setdefault((edges, *cells), grid)
            found = Stored(cut.shape, cut.dtype, chunks)
            check_cover(f"{what}: tensor {cut.names[0]}", found)
            tensors |= dict.fromkeys(cut.names, found)
    return dict(sorted(tensors.items())), files


def _alike(
    lists: Sequence[Sequence[Kind]],
) -> Iterator[tuple[list[str], tuple[tuple[int, int], ...]]]:
    """The names that are of the same kinds in all lists, and these: numbers of a list, and in it."""
    kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, listed in enumerate(lists):
        for place, kind in enumerate(listed):
            for name in kind.names:
                kinds[name].append((number, place))
    names: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
    for name, found in kinds.items():
        names[tuple(found)].append(name)
    for found, members in names.items():
        yield members, found


def _shared_out(
    kind: Kind, names: Sequence[str], holders: dict[Box, list[int]], load: list[int]
) -> Iterator[Cut]:
    """Cuts of tensors whose boxes several ranks hold: each is written by the least loaded copy.

    Args:
        load: the bytes that each rank writes so far; is added to.
    """
    ranks = list(holders.values())
    size = math.prod(next(iter(holders)).sizes) * kind.dtype.itemsize
    # Copies of the first box stand for those of the others: replicas are replicas of everything.
    copies = [(load[rank], copy) for copy, rank in enumerate(ranks[0])]
    heapq.heapify(copies)
    shares: dict[int, list[str]] = defaultdict(list)
    for name in names:
        held, copy = copies[0]
        shares[copy].append(name)
        heapq.heapreplace(copies, (held + size, copy))
    for copy, share in shares.items():
        writers = tuple(held[copy % len(held)] for held in ranks)
        for box, writer in zip(holders, writers, strict=True):
            load[writer] += math.prod(box.sizes) * kind.dtype.itemsize * len(share)
        yield Cut(kind.shape, kind.dtype, tuple(share), tuple(holders), writers)


def _by_files(
    cut: Cut, begins: Sequence[int], ends: Sequence[Sequence[int]], position: list[int]
) -> Iterator[tuple[Cut, list[int]]]:
    """Runs of a cut's names whose boxes lie in the same files, and the files' numbers, box by box.

    Args:
        begins, ends: see :func:`stored`.
        position: how many boxes of each rank there were before; is moved on.
    """
    each: dict[int, int] = defaultdict(int)
    places = []
    for writer in cut.writers:
        places.append(each[writer])
        each[writer] += 1
    # Names at which a file ends: the first that lies beyond it, and one that lies on both sides.
    stops = {0, len(cut.names)}
    for rank, count in each.items():
        for end in ends[rank]:
            before, beyond = divmod(end - position[rank], count)
            if 0 <= before < len(cut.names):
                stops |= {before, before + (beyond > 0)}
    for start, stop in itertools.pairwise(sorted(stops)):
        cells = [
            begins[rank] + bisect_right(ends[rank], position[rank] + start * each[rank] + place)
            for rank, place in zip(cut.writers, places, strict=True)
        ]
        yield replace(cut, names=cut.names[start:stop]), cells
    for rank, count in each.items():
        position[rank] += count * len(cut.names)
