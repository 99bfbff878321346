"""The boxes that the tensors of a sharded checkpoint lie in, and whether they are all of each."""

from __future__ import annotations

import math
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.schema import shown

# A box's entry in the header of its file: `"x@0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},`.
ENTRY_BYTES = 40
# Below 2**62, so that sums of a tensor's bytes and ends of boxes are no trap for what runs in C.
MAX_ELEMENTS = 2**48
# A prime: see :func:`_covered_once`.
_PRIME = 2**61 - 1


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the file that holds it."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def key(self, name: str) -> str:
        """Its name in the file."""
        return f"{name}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class Stored:
    """One dense tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Stored:
        """Read a tensor's entry of the index.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        dtype = getattr(torch, entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"tensor {name}: no dtype {shown(entry['dtype'])}")
        shape = _ints(name, entry["shape"])
        if math.prod(shape) > MAX_ELEMENTS:
            raise ValueError(f"tensor {name}: no shape {shown(shape)}")
        chunks = []
        for file, offsets, sizes in entry["chunks"]:
            if not isinstance(file, str) or "/" in file:
                raise ValueError(f"tensor {name}: expected the name of a file, got {shown(file)}")
            chunks.append(Chunk(file, _ints(name, offsets), _ints(name, sizes)))
        return cls(shape, dtype, tuple(chunks))


def _ints(name: str, values: Any) -> tuple[int, ...]:
    good = isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_ELEMENTS for n in values
    )
    if not good:
        raise ValueError(f"tensor {name}: expected a list of sizes, got {shown(values)}")
    return tuple(values)


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
    counts: dict[str, int] = defaultdict(int)
    held: dict[str, int] = defaultdict(int)
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            if chunk.file not in files:
                raise CheckpointError(
                    f"{path}: tensor {name} has a box in {shown(chunk.file)}, which is none of its files"
                )
            counts[chunk.file] += ENTRY_BYTES
            held[chunk.file] += math.prod(chunk.sizes) * stored.dtype.itemsize
        _check_cover(path, name, stored)
    for file, size in files.items():
        if counts[file] + held[file] > size:
            raise CheckpointError(
                f"{path}: {file} of {size} bytes can't hold its {counts[file] // ENTRY_BYTES} boxes of "
                f"{held[file]} bytes"
            )


def _check_cover(path: Path, name: str, stored: Stored) -> None:
    for chunk in stored.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(stored.shape) and all(
            n > 0 and a + n <= size
            for a, n, size in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {stored.shape} has no box of {chunk.sizes} at "
                f"{chunk.offsets}"
            )
    covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    whole = math.prod(stored.shape)
    if covered != whole:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {stored.shape} is not whole: its boxes hold {covered} of "
            f"{whole} elements"
        )
    if len(stored.chunks) > 1 and not _covered_once(stored.shape, stored.chunks):
        raise CheckpointError(
            f"{path}: tensor {name} of shape {stored.shape} is not whole: its boxes overlap"
        )


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
