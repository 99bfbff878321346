"""A sharded checkpoint on disk: an index in JSON, and safetensors files of boxes of dense tensors.

    pyparallel.index.json       for each tensor its shape, its dtype and its boxes: file, offsets, sizes;
                                the optimizer's options and counters; whatever the user added
    rank_00000_00.safetensors   boxes written by rank 0, each under ``name@offset,offset,...``
    config.json, tokenizer.*    of the model, where they are known

It opens like any other checkpoint, so ``load`` and ``generate`` take one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint_format import Checkpoint, CheckpointError, open_safetensors, read_json

INDEX = "pyparallel.index.json"
FORMAT = 1
# Names of an optimizer's tensors begin so; none of a model's has a slash.
OPTIMIZER = "optimizer/"
# A file that is being read is closed and opened again after so many bytes: its pages are given back.
MAPPED_BYTES = 16 << 20


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


@dataclass(frozen=True)
class Index:
    """Everything a sharded checkpoint holds but the numbers.

    Attributes:
        tensors: by name; those of the optimizer begin with :data:`OPTIMIZER`.
        files: the bytes of every file.
        state: what is no tensor: the optimizer's options and counters, and the user's additions.
    """

    tensors: dict[str, Stored]
    files: dict[str, int]
    state: dict[str, Any]

    def to_json(self) -> str:
        """As it is written."""
        tensors = {
            name: {
                "shape": stored.shape,
                "dtype": str(stored.dtype).removeprefix("torch."),
                "chunks": [[chunk.file, chunk.offsets, chunk.sizes] for chunk in stored.chunks],
            }
            for name, stored in self.tensors.items()
        }
        return json.dumps({"format": FORMAT, **asdict(self), "tensors": tensors})

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read and check the index of a folder.

        Raises:
            CheckpointError: it is no index, or of another format, or a tensor's boxes are not all of it.
        """
        path = folder / INDEX
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: expected format {FORMAT}, got {content.get('format')!r}"
            )
        try:
            tensors = {name: _stored(entry) for name, entry in content["tensors"].items()}
            index = cls(tensors, dict(content["files"]), dict(content["state"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a whole index ({error!r})") from None
        for name, stored in tensors.items():
            _check_cover(path, name, stored)
        return index


class ShardedCheckpoint(Checkpoint):
    """A folder that :func:`pyparallel.save` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path)
        self._reader: tuple[Path, int, Any] | None = None
        for name, size in self.index.files.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file")
            if file.stat().st_size != size:
                raise CheckpointError(
                    f"{file}: expected {size} bytes, got {file.stat().st_size}; it is not whole"
                )
        self.shapes = {
            name: stored.shape
            for name, stored in self.index.tensors.items()
            if not name.startswith(OPTIMIZER)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def config(self) -> Mapping[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise CheckpointError(
                f"{self.path}: there is no config.json in it; save() writes one where the model knows "
                f"its own or source= is given"
            )
        return read_json(file)

    def dtype(self, name: str) -> torch.dtype:
        return self.index.tensors[name].dtype

    def read_chunk(self, name: str, chunk: Chunk, offsets: Sequence[int], out: Tensor) -> None:
        """Fill ``out`` with the part of a box that begins at ``offsets`` within it."""
        tensors = self._open(self.path / chunk.file, out.numel() * out.itemsize)
        try:
            if out.dim() == 0:
                out.copy_(tensors.get_tensor(chunk.key(name)))
                return
            held = tuple(
                slice(start, start + size) for start, size in zip(offsets, out.shape, strict=True)
            )
            out.copy_(tensors.get_slice(chunk.key(name))[held])
        except Exception as error:
            raise CheckpointError(
                f"{self.path / chunk.file}: tensor {chunk.key(name)} can't be read ({error})"
            ) from None

    def close(self) -> None:
        """Close the file that was read last."""
        self._reader = None

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        low = [start if i == dim else 0 for i in range(out.dim())]
        for chunk in self.index.tensors[name].chunks:
            sides = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(low, out.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(a < b for a, b in sides):
                part = out[
                    tuple(
                        slice(a - first, b - first)
                        for (a, b), first in zip(sides, low, strict=True)
                    )
                ]
                inside = [a - b for (a, _), b in zip(sides, chunk.offsets, strict=True)]
                self.read_chunk(name, chunk, inside, part)
        self.close()

    def _open(self, file: Path, num_bytes: int) -> Any:
        """The opened file; see :data:`MAPPED_BYTES`."""
        if self._reader is None or self._reader[0] != file or self._reader[1] > MAPPED_BYTES:
            self._reader = (file, 0, open_safetensors(file))
        _, done, tensors = self._reader
        self._reader = (file, done + num_bytes, tensors)
        return tensors


def is_sharded(path: Path) -> bool:
    """Whether a folder holds a sharded checkpoint."""
    return (path / INDEX).is_file()


def _stored(entry: Mapping[str, Any]) -> Stored:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {entry['dtype']}")
    chunks = tuple(
        Chunk(Path(str(file)).name, tuple(map(int, offsets)), tuple(map(int, sizes)))
        for file, offsets, sizes in entry["chunks"]
    )
    return Stored(tuple(map(int, entry["shape"])), dtype, chunks)


def _check_cover(path: Path, name: str, stored: Stored) -> None:
    """Every box lies inside, and together they are as large as the tensor."""
    for chunk in stored.chunks:
        ends = [a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=False)]
        inside = len(chunk.offsets) == len(chunk.sizes) == len(stored.shape) and all(
            a >= 0 and n > 0 and end <= size
            for a, n, end, size in zip(chunk.offsets, chunk.sizes, ends, stored.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {stored.shape} has no box of {chunk.sizes} at "
                f"{chunk.offsets}"
            )
    covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    if covered != math.prod(stored.shape):
        raise CheckpointError(
            f"{path}: tensor {name} of shape {stored.shape} is not whole: its boxes hold {covered} of "
            f"{math.prod(stored.shape)} elements"
        )
