"""A sharded checkpoint on disk: an index in JSON, and safetensors files of boxes of dense tensors.

    pyparallel.index.json       what :mod:`pyparallel.checkpoint.index` describes
    rank_00000_00.safetensors   boxes written by rank 0, each under ``name@offset,offset,...``
    config.json, tokenizer.*    of the model, where they are known

It opens like any other checkpoint, so ``load`` and ``generate`` take one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint.choice import inside, read_config
from pyparallel.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    regular_file,
    stored_type,
)
from pyparallel.checkpoint.grid import Chunk
from pyparallel.checkpoint.index import INDEX, OPTIMIZER, Index, read_index
from pyparallel.checkpoint.tensor_files import Place, TensorFiles

__all__ = ["INDEX", "OPTIMIZER", "Index", "ShardedCheckpoint", "is_sharded"]


class ShardedCheckpoint(Checkpoint):
    """A folder that :func:`pyparallel.save` wrote.

    Args:
        path: the folder.
        part: which of ``of`` equal parts of its files to look at: ranks that open it together, and tell
            each other their errors, share that out.

    Raises:
        CheckpointError: the index or one of these files is missing or not whole.
    """

    def __init__(self, path: Path, *, part: int = 0, of: int = 1) -> None:
        self.path = path
        self.index = read_index(path)
        self._opened = TensorFiles()
        for name, size in list(self.index.files.items())[part::of]:
            file = inside(path, name, f"{path / INDEX}: files")
            if not os.path.lexists(file):
                raise CheckpointError(
                    f"{file}: no such file; if hosts wrote each its own part (save(per_host=True)), put "
                    f"them together: pyparallel merge"
                )
            found = regular_file(file)
            if found != size:
                raise CheckpointError(
                    f"{file}: expected {size} bytes, got {found}; it is not whole"
                )
        self.shapes = {
            name: stored.shape
            for name, stored in self.index.tensors.items()
            if not name.startswith(OPTIMIZER)
        }

    def config(self) -> Mapping[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise CheckpointError(
                f"{self.path}: there is no config.json in it; save() writes one where the model knows "
                f"its own or source= is given"
            )
        return read_config(file)

    def dtype(self, name: str) -> torch.dtype:
        return self.index.tensors[name].dtype

    def place(self, name: str, chunk: Chunk) -> tuple[str, int]:
        """The file of a box and where in it the box begins: what is read in this order goes forward."""
        return chunk.file, self._box(name, chunk).offset

    def read_chunk(self, name: str, chunk: Chunk, offsets: Sequence[int], out: Tensor) -> None:
        """Fill ``out`` with the part of a box that begins at ``offsets`` within it."""
        box = self._box(name, chunk)
        self._opened.read_box(self.path / chunk.file, box, self.dtype(name), offsets, out)

    def close(self) -> None:
        self._opened.close()

    def parts(
        self, name: str, offsets: Sequence[int], out: Tensor
    ) -> Iterator[tuple[Chunk, list[int], Tensor]]:
        """What ``out``, the box at ``offsets`` of a tensor, is read from.

        Yields:
            A stored box, where in it a part begins, and the part of ``out`` that it is.
        """
        for chunk in self.index.tensors[name].meeting(offsets, out.shape):
            sides = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(offsets, out.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            own = zip(sides, offsets, strict=True)
            place = tuple(slice(a - first, b - first) for (a, b), first in own)
            yield chunk, [a - b for (a, _), b in zip(sides, chunk.offsets, strict=True)], out[place]

    def _box(self, name: str, chunk: Chunk) -> Place:
        file, key, dtype = self.path / chunk.file, chunk.key(name), self.dtype(name)
        self.index.check_save(file, self._opened.metadata(file))
        box = self._opened.header(file).get(key)
        if box is None:
            raise CheckpointError(f"{file}: tensor {key} can't be read (it is not there)")
        stored = box.shape, stored_type(file, name, box.kind)
        if stored != (chunk.sizes, dtype):
            raise CheckpointError(
                f"{file}: tensor {key} can't be read (expected {chunk.sizes} of {dtype}, got {stored})"
            )
        return box

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        low = [start if i == dim else 0 for i in range(out.dim())]
        for chunk, inner, part in self.parts(name, low, out):
            self.read_chunk(name, chunk, inner, part)


def is_sharded(path: Path) -> bool:
    """Whether a folder holds a sharded checkpoint."""
    return (path / INDEX).is_file()
