"""What a rank tells of the boxes it holds, so shortly that a thousand ranks can tell it.

The layers of a model are cut alike, and so are an optimizer's tensors. So a rank sorts its tensors into
kinds: of one shape and dtype, and held in the same boxes. The list of kinds, with all the names, is the
same on every rank of a stage and travels once; a rank's own are the boxes of each kind, a few numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from pyparallel.checkpoint.grid import Box
from pyparallel.saving.pieces import Piece


class Kind(NamedTuple):
    """Tensors of one shape and dtype that a rank holds the same boxes of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]


# As JSON: of each kind its shape, dtype and names; of each kind its boxes' offsets and sizes in a row.
ToldKinds = list[list]
ToldBoxes = list[list[int]]


def tell(pieces: Iterable[Piece]) -> tuple[ToldKinds, ToldBoxes]:
    """The kinds of the tensors that a rank has pieces of, and its boxes of each kind, as JSON."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list[int]]] = {}
    for piece in pieces:
        _, _, boxes = tensors.setdefault(piece.name, (piece.shape, piece.tensor.dtype, []))
        boxes += [*piece.offsets, *piece.tensor.shape]
    kinds: dict[tuple, list[str]] = {}
    for name, (shape, dtype, boxes) in tensors.items():
        kinds.setdefault((shape, dtype, tuple(boxes)), []).append(name)
    listed = [
        [shape, str(dtype).removeprefix("torch."), names]
        for (shape, dtype, _), names in kinds.items()
    ]
    return listed, [list(boxes) for _, _, boxes in kinds]


def kinds_of(told: ToldKinds) -> list[Kind]:
    """The kinds that a rank has told."""
    return [Kind(tuple(shape), getattr(torch, dtype), tuple(names)) for shape, dtype, names in told]


def boxes_of(kind: Kind, told: Sequence[int]) -> list[Box]:
    """The boxes of a kind that a rank has told; of a tensor without axes the one there is."""
    axes = len(kind.shape)
    if axes == 0:
        return [Box((), ())]
    numbers = iter(told)
    sides = iter(lambda: tuple(itertools.islice(numbers, axes)), ())
    return [Box(offsets, next(sides)) for offsets in sides]
