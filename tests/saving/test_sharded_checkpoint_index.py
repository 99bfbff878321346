"""An index of ours that lies: boxes, files, types and numbers, each refused in a line."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pyparallel.checkpoint.boxes import Chunk, _covered_once
from pyparallel.checkpoint.sharded import INDEX
from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.cut.shard import REPLICATED

VALUE = torch.arange(24.0).view(4, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tensor in four boxes, and one in one."""
    boxes = {f"a@{i},{j}": VALUE[i : i + 2, j : j + 3].clone() for i in (0, 2) for j in (0, 3)}
    file = tmp_path / "rank_00000_00.safetensors"
    save_file({**boxes, "b@": torch.tensor(7.0)}, file)
    chunks = [[file.name, [i, j], [2, 3]] for i in (0, 2) for j in (0, 3)]
    index = {
        "format": 1,
        "tensors": {
            "a": {"shape": [4, 6], "dtype": "float32", "chunks": chunks},
            "b": {"shape": [], "dtype": "float32", "chunks": [[file.name, [], []]]},
        },
        "files": {file.name: file.stat().st_size},
        "state": {"extra": {}, "optimizer": None},
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as failure:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.shapes:
            checkpoint.read(name, REPLICATED, 0)
    assert time.monotonic() - begin < 60
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_the_whole_is_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read("a", REPLICATED, 0), VALUE)
    assert checkpoint.read("b", REPLICATED, 0).item() == 7


def box(number: int, place: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"]["a"]["chunks"][number].__setitem__(place, value)


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"]["a"].__setitem__(key, value)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    # Half the tensor was left as it came from the allocator.
    "overlapping": (box(1, 1, [0, 0]), "tensor a of shape (4, 6) is not whole: its boxes overlap"),
    "twice": (box(3, 1, [0, 3]), "its boxes overlap"),
    "crossing": (box(3, 1, [1, 3]), "its boxes overlap"),
    "outside": (box(3, 1, [3, 3]), "has no box of (2, 3) at (3, 3)"),
    "negative": (box(3, 1, [-1, 3]), "expected a list of sizes, got [-1, 3]"),
    "flat": (box(3, 1, [3]), "has no box"),
    "no list": (box(3, 1, 3), "expected a list of sizes, got 3"),
    "fraction": (box(3, 1, [2.0, 3]), "expected a list of sizes, got [2.0, 3]"),
    "true": (box(3, 1, [True, 3]), "expected a list of sizes"),
    "text": (box(3, 2, "23"), "expected a list of sizes, got '23'"),
    "huge": (entry("shape", [2**62, 2**62]), "expected a list of sizes"),
    "huge product": (entry("shape", [2**40, 2**40]), "no shape"),
    "many axes": (entry("shape", [4, 6, *[1] * 68]), "expected at most 64 axes, got 70"),
    "shape": (entry("shape", None), "expected a list of sizes, got None"),
    "a type": (entry("dtype", "float64"), "expected (2, 3) of torch.float64"),
    "a lying type": (entry("dtype", "int32"), "tensor a@0,0 can't be read"),
    "no type": (entry("dtype", ["float32"]), "no dtype"),
    "no dtype": (entry("dtype", "nn"), "no dtype 'nn'"),
    "no chunks": (entry("chunks", 5), "not a whole index"),
    "of two": (entry("chunks", [["x", [0, 0]]]), "not a whole index"),
    "another file": (box(0, 0, "x.safetensors"), "which is none of its files"),
    "a path": (
        box(0, 0, "../x.safetensors"),
        "expected the name of a file, got '../x.safetensors'",
    ),
    "a number": (box(0, 0, 5), "expected the name of a file, got 5"),
    "a list of tensors": (lambda index: index.update(tensors=[]), "tensors: expected an object"),
    "a tensor of text": (lambda index: index["tensors"].update(a="b"), "not a whole index"),
    "files": (lambda index: index.update(files=[1]), "files: expected an object"),
    "a size": (
        lambda index: index["files"].update({"rank_00000_00.safetensors": "9"}),
        "expected its bytes, got '9'",
    ),
    "a file outside": (
        lambda index: index["files"].update({"../x.safetensors": 9}),
        "expected a name inside",
    ),
    **{
        f"a file {name!r}": (
            lambda index, name=name: index["files"].update({name: 9}),
            "files: expected a name inside its folder, got",
        )
        for name in ("", ".", "..", "/x", "./x", "part/x.safetensors", "x\0")
    },
    "state": (lambda index: index.update(state=None), "state: expected an object"),
    "extra": (lambda index: index["state"].update(extra=[]), "extra: expected an object"),
    "optimizer": (
        lambda index: index["state"].update(optimizer=[1]),
        "optimizer: expected an object",
    ),
    "groups": (
        lambda index: index["state"].update(optimizer={}),
        "optimizer: groups: expected one",
    ),
    "options": (
        lambda index: index["state"].update(
            optimizer={"groups": [{"names": [], "options": {"lr": float("nan")}}], "state": {}}
        ),
        "optimizer: lr: expected numbers, got nan",
    ),
    "a counter": (
        lambda index: index["state"].update(
            optimizer={"groups": [], "state": {"a": {"step": {"dtype": "nn", "value": 1}}}}
        ),
        "optimizer: step of a: expected a number",
    ),
    "a save": (lambda index: index.update(save=5), "save: expected a string"),
    "another save": (lambda index: index.update(save="5"), "expected a file of the save '5'"),
    "format": (lambda index: index.update(format=True), "expected format 1 or 2, got True"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(folder: Path, lie: str) -> None:
    edit, words = LIES[lie]
    change(folder, edit)
    found = refused(folder)
    assert words in found, found


def test_half_a_million_boxes_are_bounded_by_the_files(folder: Path) -> None:
    """They took minutes, and the memory; an index is about as long as the headers of its files."""
    chunk = ["rank_00000_00.safetensors", [0, 0], [1, 1]]
    change(folder, entry("chunks", [chunk] * 24))
    assert "can't hold its 25 boxes" in refused(folder) or "more than its files" in refused(folder)
    change(folder, entry("chunks", [chunk] * 100_000))
    assert "it has 100001 boxes, more than its files of" in refused(folder)
    change(folder, entry("chunks", [chunk] * 500_000))
    assert "bytes of JSON" in refused(folder)


@given(st.data())
def test_boxes_cover_each_element_once(data: st.DataObject) -> None:
    """Against counting: boxes of a cut tensor, one of them perhaps moved."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    edges = [sorted({0, n, data.draw(st.integers(0, n))}) for n in shape]
    grid: list[tuple[tuple[int, int], ...]] = [()]
    for axis in edges:
        sides = list(itertools.pairwise(axis))
        grid = [(*cell, side) for cell in grid for side in sides]
    boxes = [([a for a, _ in cell], [b - a for a, b in cell]) for cell in grid]
    moved = data.draw(st.integers(0, len(boxes) - 1))
    _, sizes = boxes[moved]
    boxes[moved] = (
        [data.draw(st.integers(0, n - size)) for n, size in zip(shape, sizes, strict=True)],
        sizes,
    )
    count = torch.zeros(shape, dtype=torch.int64)
    for starts, lengths in boxes:
        count[tuple(slice(a, a + n) for a, n in zip(starts, lengths, strict=True))] += 1
    chunks = [Chunk("x", tuple(starts), tuple(lengths)) for starts, lengths in boxes]
    assert _covered_once(shape, chunks) == bool((count == 1).all())
