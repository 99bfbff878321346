"""A sharded checkpoint on disk: an index in JSON, and safetensors files of boxes of dense tensors.

    pyparallel.index.json       for each tensor its shape, its dtype and its boxes: file, offsets, sizes;
                                the optimizer's options and counters; whatever the user added
    rank_00000_00.safetensors   boxes written by rank 0, each under ``name@offset,offset,...``
    config.json, tokenizer.*    of the model, where they are known

It opens like any other checkpoint, so ``load`` and ``generate`` take one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint.boxes import Chunk, Stored, check_boxes, check_count
from pyparallel.checkpoint.choice import inside, read_config
from pyparallel.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    one_line,
    read_json,
    regular_file,
    stored_type,
)
from pyparallel.checkpoint.schema import Key, check_keys, shown
from pyparallel.checkpoint.state import check_optimizer
from pyparallel.checkpoint.tensor_files import TensorFiles

INDEX = "pyparallel.index.json"
FORMAT = 1
# Names of an optimizer's tensors begin so; none of a model's has a slash.
OPTIMIZER = "optimizer/"
# How much of an index may be no boxes: the optimizer's counters, and what the user added.
EXTRA_BYTES = 16 << 20
# What an index has, and its state.
_INDEX = {"tensors": Key("object"), "files": Key("object"), "state": Key("object")}
_STATE = {"optimizer": Key("object", null=True), "extra": Key("object")}


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
            CheckpointError: it is no index, or of another format; a file is missing or of another size;
                a tensor's boxes are not all of it, or overlap.
        """
        path = folder / INDEX
        held = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
        content = read_json(path, max_bytes=max_index_bytes(held))
        if content.get("format") != FORMAT or isinstance(content["format"], bool):
            raise CheckpointError(
                f"{path}: expected format {FORMAT}, got {shown(content.get('format'))}"
            )
        try:
            check_keys(f"{path}: not a whole index", content, _INDEX)
            check_count(content["tensors"].values(), held)
            tensors = {name: Stored.of(name, entry) for name, entry in content["tensors"].items()}
            files = {name: _size(name, size) for name, size in content["files"].items()}
            state = dict(content["state"])
            check_keys(f"{path}: not a whole index: state", state, _STATE)
            check_optimizer(state.get("optimizer"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            where = "" if reason.startswith(str(path)) else f"{path}: not a whole index: "
            raise CheckpointError(one_line(where + reason)) from None
        check_boxes(path, tensors, files)
        return cls(tensors, files, state)


class ShardedCheckpoint(Checkpoint):
    """A folder that :func:`pyparallel.save` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path)
        self._opened = TensorFiles()
        for name, size in self.index.files.items():
            file = inside(path, name, f"{path / INDEX}: files")
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

    def read_chunk(self, name: str, chunk: Chunk, offsets: Sequence[int], out: Tensor) -> None:
        """Fill ``out`` with the part of a box that begins at ``offsets`` within it."""
        file, key, dtype = self.path / chunk.file, chunk.key(name), self.dtype(name)
        box = self._opened.header(file).get(key)
        if box is None:
            raise CheckpointError(f"{file}: tensor {key} can't be read (it is not there)")
        stored = box.shape, stored_type(file, name, box.kind)
        if stored != (chunk.sizes, dtype):
            raise CheckpointError(
                f"{file}: tensor {key} can't be read (expected {chunk.sizes} of {dtype}, got {stored})"
            )
        self._opened.read_box(file, box, dtype, offsets, out)

    def close(self) -> None:
        self._opened.close()

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


def max_index_bytes(held: int) -> int:
    """How long an index may be: about as long as the headers of its files, which list the same boxes.

    Args:
        held: the bytes of the files.
    """
    return min(EXTRA_BYTES + 4 * held, 4 << 30)


def _size(name: str, size: Any) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"files: {name}: expected its bytes, got {shown(size)}")
    return size


def is_sharded(path: Path) -> bool:
    """Whether a folder holds a sharded checkpoint."""
    return (path / INDEX).is_file()
