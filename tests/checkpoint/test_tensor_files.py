"""Open files of tensors: how often they are opened, which bytes a box gets, what a changed file does."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from bench.checkpoint.cold_reads import drop, read_bytes
from pyparallel.checkpoint import tensor_files
from pyparallel.checkpoint.boxes import Chunk, Stored
from pyparallel.checkpoint.sharded import INDEX, Index
from pyparallel.checkpoint.source import Checkpoint, CheckpointError, open_checkpoint
from pyparallel.checkpoint.tensor_files import Place, TensorFiles
from pyparallel.cut.shard import REPLICATED, even_parts

_counters: list[list[str]] = []


def _count(event: str, args: tuple) -> None:
    if event == "open" and _counters:
        _counters[-1].append(str(args[0]))


sys.addaudithook(_count)


@contextmanager
def opens(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[list[str]]:
    """Inside, collects every opening of a file below a folder, and of one by safetensors."""
    found: list[str] = []
    real = safetensors.safe_open

    def counted(file: Path, framework: str) -> object:
        found.append(str(file))
        return real(file, framework)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", counted)
        _counters.append(found)
        try:
            yield found
        finally:
            _counters.pop()
    found[:] = [file for file in found if file.startswith((str(folder), "/proc/self/fd"))]


def as_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def as_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """Two files with half of the rows of every tensor each."""
    stored, sizes = {}, {}
    for part in range(2):
        file = f"rank_{part:05}_00.safetensors"
        boxes = {}
        for name, value in tensors.items():
            half = value.shape[0] // 2
            chunk = Chunk(file, (part * half, 0), (half, value.shape[1]))
            boxes[chunk.key(name)] = value[part * half :][:half].contiguous()
            chunks = (*stored[name].chunks, chunk) if part else (chunk,)
            stored[name] = Stored(tuple(value.shape), value.dtype, chunks)
        save_file(boxes, folder / file)
        sizes[file] = (folder / file).stat().st_size
    (folder / INDEX).write_text(Index(stored, sizes, {"optimizer": None, "extra": {}}).to_json())
    return open_checkpoint(folder)


def as_gguf(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


@pytest.mark.parametrize("write", [as_safetensors, as_sharded, as_gguf])
def test_files_are_opened_as_often_for_many_tensors_as_for_few(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, dict[str, torch.Tensor]], Checkpoint],
) -> None:
    """At most twice each: a safetensors' descriptor is lent to the library, which checks the header."""
    counts = []
    for number in (4, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {f"t{i}": torch.full((4, 32), float(i)) for i in range(number)}
        checkpoint = write(folder, tensors)
        descriptors = len(os.listdir("/proc/self/fd"))
        with opens(monkeypatch, folder) as found:
            for name, value in tensors.items():
                for rank in range(2):
                    sharding = even_parts(4, 2)
                    assert torch.equal(
                        checkpoint.read(name, sharding, rank), sharding.split(value, rank)
                    )
        counts.append(len(found))
        checkpoint.close()
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert counts[0] == counts[1] <= 4


def test_many_files_are_not_all_open(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(tensor_files.MAX_OPEN + 20)]
    weight_map = {}
    for name in names:
        weight_map[name] = f"{name}.safetensors"
        save_file({name: torch.ones(2)}, tmp_path / weight_map[name])
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    for name in names:
        checkpoint.read(name, REPLICATED, 0)
    assert len(os.listdir("/proc/self/fd")) == before + tensor_files.MAX_OPEN
    copy = pickle.loads(pickle.dumps(checkpoint))
    del checkpoint
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(copy.read("t3", REPLICATED, 0), torch.ones(2))


def test_any_box_of_any_tensor(tmp_path: Path) -> None:
    """Random boxes, among them such whose rows are read one by one or in several pieces."""
    draw = random.Random(0)
    shapes = [
        (),
        (7,),
        (0, 3),
        (9, 5),
        (6, 9000),
        (3000, 130),
        (3, 4, 5),
        (2, 3, 4, 5),
        (2, 3, 9000),
    ]
    file = tmp_path / "model.safetensors"
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        tensors = {str(i): torch.randint(-9, 9, shape).to(dtype) for i, shape in enumerate(shapes)}
        file.unlink(missing_ok=True)
        save_file(tensors, file)
        files = TensorFiles()
        for name, value in tensors.items():
            for _ in range(12):
                sides = [sorted(draw.choices(range(n + 1), k=2)) for n in value.shape]
                sides = [
                    s if draw.random() < 0.6 else [0, n]
                    for s, n in zip(sides, value.shape, strict=True)
                ]
                expected = value[tuple(slice(a, b) for a, b in sides)]
                starts = [a for a, _ in sides]
                place = files.header(file)[name]
                for other in (dtype, torch.float64):
                    out = torch.full(expected.shape, 77, dtype=other)
                    files.read_box(file, place, dtype, starts, out)
                    assert torch.equal(out, expected.to(other)), (value.shape, sides)
                turned = torch.full(expected.shape[::-1], 77, dtype=dtype).permute(
                    tuple(reversed(range(expected.dim())))
                )
                files.read_box(file, place, dtype, starts, turned)
                assert torch.equal(turned, expected), (value.shape, sides)


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    checkpoint = as_safetensors(tmp_path, {"a": torch.zeros(400), "b": torch.zeros(400)})
    other = tmp_path / "other"
    save_file({"b": torch.ones(400), "a": torch.ones(401)}, other)
    # Whoever has it open goes on reading what was there.
    assert checkpoint.read("a", REPLICATED, 0).sum() == 0
    os.replace(other, file)
    assert checkpoint.read("b", REPLICATED, 0).sum() == 0
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it was replaced while it was"):
        checkpoint.read("a", REPLICATED, 0)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a", REPLICATED, 0).sum() == 401
    os.truncate(file, 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it became shorter"):
        checkpoint.read("b", REPLICATED, 0)


def test_a_rank_asks_for_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are cut far apart an eighth is read, of near ones the rows."""
    file = tmp_path / "model.safetensors"
    values = {"far": torch.rand(16, 32768), "near": torch.rand(16, 512)}
    save_file(values, file)
    files, real, asked = TensorFiles(), os.preadv, []

    def counted(opened: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(map(len, buffers)))
        return real(opened, buffers, offset)

    for name, bytes_read in (("far", 16 * 4096 * 4), ("near", 16 * 512 * 4)):
        place: Place = files.header(file)[name]
        columns = place.shape[1] // 8
        out = torch.empty(16, columns)
        with monkeypatch.context() as patched:
            asked.clear()
            patched.setattr(os, "preadv", counted)
            files.read_box(file, place, torch.float32, (0, columns), out)
        assert torch.equal(out, values[name][:, columns : 2 * columns])
        assert sum(asked) == bytes_read


@pytest.mark.parametrize("write", [as_safetensors, as_gguf])
def test_columns_that_lie_far_apart_are_read_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, dict[str, torch.Tensor]], Checkpoint],
) -> None:
    value = torch.rand(16, 32768)
    checkpoint, sharding = write(tmp_path, {"far": value}), even_parts(32768, 8, dim=1)
    real, asked = os.preadv, []

    def counted(opened: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(map(len, buffers)))
        return real(opened, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", counted)
        shard = checkpoint.read("far", sharding, 3)
    assert torch.equal(shard, sharding.split(value, 3))
    # Beside the header.
    assert sum(asked) < shard.numel() * 4 + 1000


def test_a_rank_takes_its_rows_and_the_header_from_the_disk(tmp_path: Path) -> None:
    """Nothing is read ahead; where the folder is in memory nothing is read at all."""
    value = torch.rand(512, 16384)
    checkpoint, sharding = as_safetensors(tmp_path, {"a": value}), even_parts(512, 8)
    checkpoint.close()
    drop(tmp_path / "model.safetensors")
    before = read_bytes()
    shard = open_checkpoint(tmp_path).read("a", sharding, 3)
    assert read_bytes() - before < shard.numel() * 4 + (64 << 10)
    assert torch.equal(shard, sharding.split(value, 3))
