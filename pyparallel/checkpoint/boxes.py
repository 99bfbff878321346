"""The boxes that the tensors of a sharded checkpoint lie in, and whether they are all of each."""

from __future__ import annotations

import math
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.grid import Chunk, Grid
from pyparallel.checkpoint.schema import shown

# A box's entry in the header of its file: `"x@0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},`.
ENTRY_BYTES = 40
# Below 2**62, so that sums of a tensor's bytes and ends of boxes are no trap for what runs in C.
MAX_ELEMENTS = 2**48
# What torch's operations take.
MAX_AXES = 64
# What sums of bytes stay below, for the same reason.
_MOST_BYTES = 2**62
# A prime: see :func:`_covered_once`.
_PRIME = 2**61 - 1


@dataclass(frozen=True)
class Stored:
    """One dense tensor of a checkpoint.

    Attributes:
        chunks: its boxes, as a :class:`Grid` where they are one; tensors that are cut alike share it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Sequence[Chunk]

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Stored:
        """Read a tensor's entry of the index.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        what = f"tensor {name}"
        dtype, shape = dtype_of(what, entry["dtype"]), ints(what, entry["shape"])
        check_shape(what, shape)
        chunks = []
        for file, offsets, sizes in entry["chunks"]:
            if not isinstance(file, str) or "/" in file:
                raise ValueError(f"tensor {name}: expected the name of a file, got {shown(file)}")
            chunks.append(Chunk(file, ints(what, offsets), ints(what, sizes)))
        return cls(shape, dtype, tuple(chunks))

    def meeting(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Chunk]:
        """The boxes that overlap one."""
        if isinstance(self.chunks, Grid):
            return self.chunks.meeting(offsets, sizes)
        return (chunk for chunk in self.chunks if _overlap(chunk, offsets, sizes))


def dtype_of(what: str, name: Any) -> torch.dtype:
    """The dtype of a name in an index.

    Raises:
        ValueError: it is none; ``what`` has it.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{what}: no dtype {shown(name)}")
    return dtype


def _overlap(chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
    sides = zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)


def ints(what: str, values: Any) -> tuple[int, ...]:
    """A list of sizes or offsets in an index.

    Raises:
        ValueError: it is none; ``what`` has it.
    """
    good = isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_ELEMENTS for n in values
    )
    if not good:
        raise ValueError(f"{what}: expected a list of sizes, got {shown(values)}")
    return tuple(values)


def check_shape(what: str, shape: Sequence[int]) -> None:
    """A tensor in an index has no more axes and elements than there can be.

    Raises:
        ValueError: it has; ``what`` has it.
    """
    if len(shape) > MAX_AXES:
        raise ValueError(f"{what}: expected at most {MAX_AXES} axes, got {len(shape)}")
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"{what}: no shape {shown(shape)}")


def check_count(entries: Iterable[Mapping[str, Any]], held: int) -> None:
    """The boxes are not more than files of ``held`` bytes can list.

    Raises:
        ValueError, KeyError, TypeError: they are, or an entry is none.
    """
    count = sum(len(entry["chunks"]) for entry in entries)
    if count * ENTRY_BYTES > held:
        raise ValueError(f"it has {count} boxes, more than its files of {held} bytes can hold")


def check_boxes(path: Path, tensors: Mapping[str, Stored], files: Mapping[str, int]) -> None:
    """Every tensor's boxes lie in it, are in files of the index, and cover each element once.

    Raises:
        CheckpointError: they don't; the message names the tensor.
    """
    for name, stored in tensors.items():
        if isinstance(stored.chunks, Grid):
            continue
        for chunk in stored.chunks:
            if chunk.file not in files:
                raise CheckpointError(
                    f"{path}: tensor {name} has a box in {shown(chunk.file)}, which is none of its files"
                )
        check_cover(f"{path}: tensor {name}", stored)
    # Tensors that share their boxes are counted together.
    alike: dict[int, list[Stored]] = defaultdict(list)
    for stored in tensors.values():
        alike[id(stored.chunks)].append(stored)
    counts, held = np.zeros((2, len(files)), np.int64)
    whole, numbers = 0, {file: number for number, file in enumerate(files)}
    for members in alike.values():
        chunks, item = members[0].chunks, sum(stored.dtype.itemsize for stored in members)
        whole += math.prod(members[0].shape) * item + ENTRY_BYTES * len(chunks) * len(members)
        if whole > min(sum(files.values()), _MOST_BYTES):
            raise CheckpointError(
                f"{path}: its files of {sum(files.values())} bytes can't hold its boxes of {whole}"
            )
        if isinstance(chunks, Grid):
            cells, sizes = np.asarray(chunks.cells), chunks.volumes()
        else:
            cells = np.asarray([numbers[chunk.file] for chunk in chunks], np.int64)
            sizes = np.asarray([math.prod(chunk.sizes) for chunk in chunks], np.int64)
        np.add.at(counts, cells, len(members))
        np.add.at(held, cells, sizes * item)
    for (file, size), count, boxes in zip(files.items(), counts, held, strict=True):
        if count * ENTRY_BYTES + boxes > size:
            raise CheckpointError(
                f"{path}: {file} of {size} bytes can't hold its {count} boxes of {boxes} bytes"
            )


def check_cover(what: str, stored: Stored) -> None:
    """A tensor's boxes lie in it, and cover each element once.

    Raises:
        CheckpointError: they don't; ``what`` is the tensor.
    """
    if isinstance(stored.chunks, Grid):
        return
    for chunk in stored.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(stored.shape) and all(
            n > 0 and a + n <= size
            for a, n, size in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{what} of shape {stored.shape} has no box of {chunk.sizes} at {chunk.offsets}"
            )
    covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    whole = math.prod(stored.shape)
    if covered != whole:
        raise CheckpointError(
            f"{what} of shape {stored.shape} is not whole: its boxes hold {covered} of {whole} elements"
        )
    if len(stored.chunks) > 1 and not _covered_once(stored.shape, stored.chunks):
        raise CheckpointError(f"{what} of shape {stored.shape} is not whole: its boxes overlap")


def _covered_once(shape: Sequence[int], chunks: Sequence[Chunk]) -> bool:
    """Whether boxes inside a tensor have each of its elements exactly once, in time linear in them.

    Each coordinate i of axis d weighs a random u[d][i], a box the product over d of its coordinates'
    sums: with W[d][i] = u[d][0] + ... + u[d][i - 1], prod_d (W[d][end] - W[d][start]). The boxes' sum
    minus the whole's is the polynomial sum_cells (times covered - 1) prod_d u[d][cell[d]]; it is zero
    for all u only if every cell is covered once, and otherwise for random u with probability below
    len(shape) / 2**61 (Schwartz and Zippel).
    """
    weights = [{0: 0} for _ in shape]

    def side(axis: int, start: int, end: int) -> int:
        known = weights[axis]
        for edge in (start, end):
            if edge not in known:
                known[edge] = secrets.randbelow(_PRIME)
        return known[end] - known[start]

    def weight(starts: Sequence[int], sizes: Sequence[int]) -> int:
        product = 1
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            product = product * side(axis, start, start + size) % _PRIME
        return product

    whole = weight([0] * len(shape), shape)
    return sum(weight(chunk.offsets, chunk.sizes) for chunk in chunks) % _PRIME == whole
