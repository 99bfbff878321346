"""The index of a sharded checkpoint: in which boxes of which files its tensors lie, in JSON.

    format    2
    files     the bytes of each file, by its name
    boxes     a list of cuts. One that is a grid: ``edges``, where the parts of each axis begin and the
              last one's end, and ``cells``, the number of the file of each box, the last axis first. Any
              other: ``shape``, and ``chunks``, a list of [number of the file, offsets, sizes]
    tensors   each tensor's dtype and the number of its boxes: those of all layers are cut alike
    state     the optimizer's options and counters; whatever the user added
    save      where hosts wrote each its own part: what names this save, in each file's metadata too

So its length grows with the tensors, and with the ranks that wrote, but not with both together. In
format 1, which is still read, each tensor has its shape, dtype and chunks ([name of the file, offsets,
sizes]).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyparallel.checkpoint.boxes import (
    Stored,
    check_boxes,
    check_count,
    check_shape,
    dtype_of,
    ints,
)
from pyparallel.checkpoint.format import CheckpointError, one_line, read_json, regular_file
from pyparallel.checkpoint.grid import Chunk, Grid
from pyparallel.checkpoint.paths import is_plain
from pyparallel.checkpoint.schema import Key, check_keys, shown
from pyparallel.checkpoint.state import check_optimizer

INDEX = "pyparallel.index.json"
FORMAT = 2
# Names of an optimizer's tensors begin so; none of a model's has a slash.
OPTIMIZER = "optimizer/"
# Under what a file's metadata name the save that it is of.
SAVE = "pyparallel.save"
# How much of an index may be no boxes: the optimizer's counters, and what the user added.
EXTRA_BYTES = 16 << 20
# What an index has, and its state.
_INDEX = {
    "tensors": Key("object"),
    "files": Key("object"),
    "state": Key("object"),
    "save": Key("str"),
}
_STATE = {"optimizer": Key("object", null=True), "extra": Key("object")}


@dataclass(frozen=True)
class Index:
    """Everything a sharded checkpoint holds but the numbers.

    Attributes:
        tensors: by name; those of the optimizer begin with :data:`OPTIMIZER`.
        files: the bytes of every file.
        state: what is no tensor: the optimizer's options and counters, and the user's additions.
        save: names the save, where hosts wrote each its own part. Names and sizes of their files are
            those of any other step's.
    """

    tensors: dict[str, Stored]
    files: dict[str, int]
    state: dict[str, Any]
    save: str | None = None

    def check_save(self, file: Path, metadata: Mapping[str, str] | None) -> None:
        """A file is of the same save as the index.

        Args:
            metadata: the file's.

        Raises:
            CheckpointError: it is of another.
        """
        found = (metadata or {}).get(SAVE)
        if found != self.save:
            raise CheckpointError(
                f"{file}: expected a file of the save {shown(self.save)}, as {INDEX} is, got one of "
                f"{shown(found)}; put together what all hosts wrote in one save"
            )

    def to_json(self) -> str:
        """As it is written."""
        numbers = {file: number for number, file in enumerate(self.files)}
        cuts: dict[int, int] = {}
        boxes, tensors = [], {}
        for name, stored in self.tensors.items():
            if id(stored.chunks) not in cuts:
                cuts[id(stored.chunks)] = len(boxes)
                boxes.append(_told(stored, numbers))
            dtype = str(stored.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "boxes": cuts[id(stored.chunks)]}
        content = {"files": self.files, "boxes": boxes, "tensors": tensors, "state": self.state}
        if self.save is not None:
            content["save"] = self.save
        return json.dumps({"format": FORMAT, **content})


def read_index(folder: Path) -> Index:
    """Read and check the index of a folder.

    Raises:
        CheckpointError: it is no index, or of another format; a file's name leads out of the folder; a
            tensor's boxes are not all of it, or overlap.
    """
    path = folder / INDEX

    def held() -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())

    small = regular_file(path) <= EXTRA_BYTES
    content = read_json(path, max_bytes=EXTRA_BYTES if small else max_index_bytes(held()))
    number = content.get("format")
    if number not in (1, FORMAT) or isinstance(number, bool):
        raise CheckpointError(f"{path}: expected format 1 or {FORMAT}, got {shown(number)}")
    try:
        check_keys(f"{path}: not a whole index", content, _INDEX)
        files = {name: _size(name, size) for name, size in content["files"].items()}
        if number == 1:
            check_count(content["tensors"].values(), held())
            tensors = {name: Stored.of(name, entry) for name, entry in content["tensors"].items()}
        else:
            tensors = _tensors(content, list(files))
        state = dict(content["state"])
        check_keys(f"{path}: not a whole index: state", state, _STATE)
        check_optimizer(state.get("optimizer"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        where = "" if reason.startswith(str(path)) else f"{path}: not a whole index: "
        raise CheckpointError(one_line(where + reason)) from None
    check_boxes(path, tensors, files)
    return Index(tensors, files, state, content.get("save"))


def max_index_bytes(held: int) -> int:
    """How long an index may be: about as long as the headers of its files, which list the same boxes.

    Args:
        held: the bytes of the files.
    """
    return min(EXTRA_BYTES + 4 * held, 4 << 30)


def _told(stored: Stored, numbers: Mapping[str, int]) -> dict[str, Any]:
    chunks = stored.chunks
    if isinstance(chunks, Grid):
        cells = [numbers[chunks.files[number]] for number in chunks.cells]
        return {"edges": chunks.edges, "cells": cells}
    listed = [[numbers[chunk.file], chunk.offsets, chunk.sizes] for chunk in chunks]
    return {"shape": stored.shape, "chunks": listed}


def _tensors(content: Mapping[str, Any], files: Sequence[str]) -> dict[str, Stored]:
    if not isinstance(content["boxes"], list):
        raise ValueError(f"boxes: expected a list, got {shown(content['boxes'])}")
    cuts = [_cut(f"boxes {i}", entry, files) for i, entry in enumerate(content["boxes"])]
    tensors, known = {}, {}
    for name, entry in content["tensors"].items():
        dtype, number = entry["dtype"], entry["boxes"]
        if type(number) is not int or not 0 <= number < len(cuts):
            raise ValueError(
                f"tensor {name}: expected the number of one of {len(cuts)} boxes, got {shown(number)}"
            )
        if (found := known.get((dtype, number) if isinstance(dtype, str) else None)) is None:
            found = Stored(cuts[number][0], dtype_of(f"tensor {name}", dtype), cuts[number][1])
            known[dtype, number] = found
        tensors[name] = found
    return tensors


def _cut(
    what: str, entry: Mapping[str, Any], files: Sequence[str]
) -> tuple[tuple[int, ...], Sequence[Chunk]]:
    """The shape that one list of boxes is of, and the boxes."""
    if "edges" not in entry:
        shape = ints(what, entry["shape"])
        numbers = ints(what, [number for number, _, _ in entry["chunks"]])
        _check_files(what, numbers, files)
        boxes = [(ints(what, offsets), ints(what, sizes)) for _, offsets, sizes in entry["chunks"]]
        chunks: Sequence[Chunk] = tuple(
            Chunk(files[number], *box) for number, box in zip(numbers, boxes, strict=True)
        )
    else:
        edges = tuple(ints(what, axis) for axis in entry["edges"])
        cells = ints(what, entry["cells"])
        for axis in edges:
            if (
                axis[:1] != (0,)
                or len(axis) < 2
                or any(a >= b for a, b in itertools.pairwise(axis))
            ):
                raise ValueError(f"{what}: expected edges from 0 upwards, got {shown(axis)}")
        if len(cells) != math.prod(len(axis) - 1 for axis in edges):
            raise ValueError(f"{what}: {len(cells)} cells are not those between its edges")
        _check_files(what, cells, files)
        grid = Grid(edges, cells, files)
        shape, chunks = grid.shape, grid
    check_shape(what, shape)
    return shape, chunks


def _check_files(what: str, numbers: Sequence[int], files: Sequence[str]) -> None:
    if numbers and max(numbers) >= len(files):
        raise ValueError(
            f"{what}: expected the number of one of {len(files)} files, got {max(numbers)}"
        )


def _size(name: str, size: Any) -> int:
    if not is_plain(name):
        raise ValueError(f"files: expected a name inside its folder, got {shown(name)}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"files: {name}: expected its bytes, got {shown(size)}")
    return size
