"""Boxes of a tensor by a rule: the places where each axis is cut, and the file of each cell.

That is how the ranks of a mesh cut a tensor (tp one axis, FSDP the same or another), and it is much
shorter than a list of boxes: tensors that are cut alike, those of all layers, share one.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """Where a box of a tensor begins, and its sizes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def box_key(name: str, offsets: Sequence[int]) -> str:
    """The name in its file of the box of a tensor that begins at ``offsets``."""
    return f"{name}@{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the file that holds it."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def key(self, name: str) -> str:
        """Its name in the file."""
        return box_key(name, self.offsets)


@dataclass(frozen=True)
class Grid(Sequence[Chunk]):
    """Every box between two neighbouring cuts of each axis: each element of a tensor once.

    Attributes:
        edges: for each axis where its parts begin, and its end.
        cells: for each box the number of its file, in the order of the last axis first.
        files: names by number.
    """

    edges: tuple[tuple[int, ...], ...]
    cells: Sequence[int]
    files: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(axis[-1] for axis in self.edges)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, number: int) -> Chunk:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        place, rest = [], number % len(self)
        for axis in reversed(self.edges):
            rest, part = divmod(rest, len(axis) - 1)
            place.append(part)
        return self._chunk(tuple(reversed(place)))

    def volumes(self) -> np.ndarray:
        """The elements of each box, int64."""
        sizes = [np.diff(axis) for axis in self.edges]
        # Flat after each axis: an array has fewer axes than a tensor may have, 32 before numpy 2.
        return reduce(lambda a, b: np.multiply.outer(a, b).ravel(), sizes, np.ones(1, np.int64))

    def meeting(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Chunk]:
        """The boxes that overlap one, found without a look at the others."""
        sides = [
            range(bisect_right(axis, start) - 1, bisect_left(axis, start + size))
            for axis, start, size in zip(self.edges, offsets, sizes, strict=True)
        ]
        return map(self._chunk, itertools.product(*sides))

    def _chunk(self, place: tuple[int, ...]) -> Chunk:
        number = 0
        for part, axis in zip(place, self.edges, strict=True):
            number = number * (len(axis) - 1) + part
        sides = list(zip(self.edges, place, strict=True))
        return Chunk(
            self.files[self.cells[number]],
            tuple(axis[part] for axis, part in sides),
            tuple(axis[part + 1] - axis[part] for axis, part in sides),
        )


def grid_of(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[tuple[int, ...], ...] | None:
    """The edges of the grid that boxes of a tensor are, sorted by their offsets; None: they are none."""
    starts = [sorted({box.offsets[axis] for box in boxes}) for axis in range(len(shape))]
    edges = tuple((*begins, end) for begins, end in zip(starts, shape, strict=True))
    if len(boxes) != math.prod(map(len, starts)) or any(axis[:1] != (0,) for axis in edges):
        return None
    sides = [list(itertools.pairwise(axis)) for axis in edges]
    cells = itertools.product(*sides)
    for box, cell in zip(boxes, cells, strict=True):
        if box.offsets != tuple(a for a, _ in cell) or box.sizes != tuple(b - a for a, b in cell):
            return None
    return edges
