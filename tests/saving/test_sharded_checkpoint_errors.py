"""Broken checkpoints, checkpoints of other models, and ranks that fail: one line, on every rank."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyparallel.checkpoint import storage as checkpoint_storage
from pyparallel.checkpoint.sharded import INDEX
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.launch import RankError, launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.saving.save import restore, save
from tests.saving.test_merge import check_saves
from tests.saving.test_sharded_checkpoint import with_state
from tests.transformers_models import build

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    build("llama").save_pretrained(path / "llama")
    build("llama", vocab_size=60, eos_token_id=59).save_pretrained(path / "smaller")
    return path


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage to the index."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    file = first_file(folder)
    file.write_bytes(file.read_bytes()[:-10])


def rename_a_box(folder: Path) -> None:
    """A file of the same size that lacks one of its boxes."""
    file = first_file(folder)
    name = f"{EMBEDDING}@0,0".encode()
    file.write_bytes(file.read_bytes().replace(name, b"x" + name[1:]))


def add_tensor(index: dict[str, Any]) -> None:
    index["tensors"]["model.layers.9.extra"] = index["tensors"][NORM]


def cut_of(index: dict[str, Any]) -> dict[str, Any]:
    """The boxes of the embedding."""
    return index["boxes"][index["tensors"][EMBEDDING]["boxes"]]


def chunks_of(index: dict[str, Any]) -> list[Any]:
    """The boxes of the embedding, made its own and listed one by one."""
    cut = cut_of(index)
    rows, (_, columns) = cut["edges"]
    sides = zip(cut["cells"], itertools.pairwise(rows), strict=True)
    chunks = [[cell, [a, 0], [b - a, columns]] for cell, (a, b) in sides]
    index["tensors"][EMBEDDING]["boxes"] = len(index["boxes"])
    index["boxes"].append({"shape": [rows[-1], columns], "chunks": chunks})
    return chunks


def move_a_box(index: dict[str, Any]) -> None:
    chunks_of(index)[0][1] = [40, 0]


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (edit(lambda index: index["tensors"].pop(NORM)), f"tensor {NORM} is missing"),
    "extra": (edit(add_tensor), "tensor model.layers.9.extra is not one of this model"),
    "a box lost": (
        edit(lambda index: chunks_of(index).pop()),
        f"tensor {EMBEDDING} of shape (61, 36) is not whole",
    ),
    "listed": (edit(lambda index: chunks_of(index).append(1)), "not a whole index"),
    "a cell lost": (
        edit(lambda index: cut_of(index)["cells"].pop()),
        "1 cells are not those between its edges",
    ),
    "an edge back": (
        edit(lambda index: cut_of(index)["edges"][0].append(3)),
        "expected edges from 0 upwards, got (0, ",
    ),
    "a file too many": (
        edit(lambda index: cut_of(index).update(cells=[0, 9])),
        "expected the number of one of 2 files, got 9",
    ),
    "no such boxes": (
        edit(lambda index: index["tensors"][NORM].update(boxes=True)),
        "expected the number of one of",
    ),
    "huge": (
        edit(lambda index: cut_of(index).update(edges=[[0, 1, 2**30], [0, 2**30]])),
        "no shape (1073741824, 1073741824)",
    ),
    "large": (
        edit(lambda index: cut_of(index).update(edges=[[0, 31, 2**30], [0, 36]])),
        "can't hold its boxes of",
    ),
    "many axes": (
        edit(lambda index: cut_of(index).update(edges=[[0, 31, 61], [0, 36], *[[0, 1]] * 68])),
        "expected at most 64 axes, got 70",
    ),
    "a larger file": (
        edit(lambda index: cut_of(index).update(edges=[[0, 1, 61], [0, 36]])),
        "boxes of",
    ),
    "a box outside": (edit(move_a_box), f"tensor {EMBEDDING} of shape (61, 36) has no box"),
    "format": (edit(lambda index: index.update(format=7)), "expected format 1 or 2, got 7"),
    "a file outside": (
        edit(lambda index: index["files"].update({"../x": 9})),
        "files: expected a name inside its folder, got '../x'",
    ),
    "no files": (edit(lambda index: index.pop("files")), "not a whole index"),
    "dtype": (
        edit(lambda index: index["tensors"][NORM].update(dtype="nn")),
        "not a whole index",
    ),
    "not json": (lambda folder: (folder / INDEX).write_text("{"), "not readable as JSON"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "expected a JSON object"),
    "truncated": (truncate, "it is not whole"),
    "lost file": (lambda folder: first_file(folder).unlink(), "no such file"),
    "renamed box": (rename_a_box, f"tensor {EMBEDDING}@0,0 can't be read"),
    "no moment": (
        edit(lambda index: index["tensors"].pop(f"optimizer/exp_avg/{NORM}")),
        f"tensor optimizer/exp_avg/{NORM} is missing",
    ),
}


def failure(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def restore_damaged(root: Path, out: Path) -> dict[str, str]:
    mesh = init_mesh(tp=2)
    model = load(root / "llama", mesh)
    optimizer = with_state(model)
    save(model, out / "whole", mesh, optimizer=optimizer)
    found = {}
    for name, (damage, _) in DAMAGES.items():
        if mesh.tp.rank == 0:
            shutil.copytree(out / "whole", out / name)
            damage(out / name)
        torch.distributed.barrier()
        before = [p.detach().clone() for p in model.parameters()]
        found[name] = failure(lambda: restore(model, out / name, mesh, optimizer=optimizer))  # noqa: B023
        if name != "renamed box":
            # What does not fit changes nothing.
            pairs = zip(model.parameters(), before, strict=True)
            assert all(torch.equal(p, old) for p, old in pairs), name
    return found


def test_damaged_checkpoints(root: Path, tmp_path: Path) -> None:
    ranks = launch(restore_damaged, 2, root, tmp_path, threads=1)
    for name, (_, words) in DAMAGES.items():
        assert words in ranks[0][name], name
        assert ranks[1][name] == ranks[0][name]


def misuse(root: Path, out: Path) -> dict[str, str]:
    mesh = init_mesh(tp=2)
    model = load(root / "llama", mesh)
    optimizer = with_state(model)
    save(model, out / "whole", mesh, optimizer=optimizer)
    save(model, out / "weights", mesh)
    for step in ("one", "two"):
        save(model, out / step, mesh, per_host=True)
    restore(model, out / "whole", mesh)
    smaller = load(root / "smaller", mesh)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    grouped = torch.optim.AdamW([{"params": norms, "weight_decay": 0.0}, {"params": others}])
    frozen = torch.optim.AdamW(norms)
    save(model, out / "grouped", mesh, optimizer=grouped)
    save(model, out / "frozen", mesh, optimizer=frozen)
    found = {
        "nowhere": failure(lambda: restore(model, out / "nowhere", mesh)),
        "not sharded": failure(lambda: restore(model, root / "llama", mesh)),
        "smaller": failure(lambda: restore(smaller, out / "whole", mesh)),
        "no optimizer": failure(lambda: restore(model, out / "weights", mesh, optimizer=optimizer)),
        "groups": failure(lambda: restore(model, out / "grouped", mesh, optimizer=optimizer)),
        "not trained": failure(lambda: restore(model, out / "frozen", mesh, optimizer=optimizer)),
        "there": failure(lambda: save(model, out / "whole", mesh)),
        "extra": failure(lambda: save(model, out / "x", mesh, extra={"a": torch.ones(1)})),
        "int8": failure(lambda: save(load(root / "llama", mesh, weights="int8"), out / "x", mesh)),
        "meta": failure(lambda: save(nn.Linear(2, 2, device="meta"), out / "x", mesh)),
        "other optimizer": failure(
            lambda: save(model, out / "x", mesh, optimizer=with_state(nn.Linear(2, 2)))
        ),
    }
    # One rank fails, and all raise what it says.
    if mesh.tp.rank == 1:
        optimizer.state[model.norm.weight]["rows"] = torch.ones(3)
    found["state"] = failure(lambda: save(model, out / "x", mesh, optimizer=optimizer))
    found["disk"] = full_disk(model, out / "x", mesh)
    # The folder that is overwritten is there until the new one is whole.
    found["disk again"] = full_disk(model, out / "whole", mesh)
    restore(model, out / "whole", mesh)
    save(model, out / "whole", mesh, overwrite=True, extra={"new": True})
    assert restore(model, out / "whole", mesh) == {"new": True}
    return found


def full_disk(model: nn.Module, folder: Path, mesh: Mesh) -> str:
    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    written = checkpoint_storage.save_file
    checkpoint_storage.save_file = no_space if mesh.tp.rank == 1 else written
    try:
        return failure(lambda: save(model, folder, mesh, overwrite=True))
    finally:
        checkpoint_storage.save_file = written


def test_misuse_and_ranks_that_fail(root: Path, tmp_path: Path) -> None:
    ranks = launch(misuse, 2, root, tmp_path, threads=1)
    assert ranks[1] == ranks[0]
    for name, words in {
        "nowhere": "nowhere: no such folder",
        "not sharded": "not written by pyparallel.save()",
        "smaller": f"tensor {EMBEDDING} has shape (61, 36), expected (60, 36)",
        "no optimizer": "it was saved without an optimizer",
        "groups": "were in groups [0, 1] of the saved one",
        "not trained": f"its optimizer has no parameter {EMBEDDING}",
        "there": "is there already",
        "extra": "extra: expected what JSON can hold",
        "int8": "weight: expected a floating dtype, got int8 weights, which are for inference",
        "meta": "weight: expected a tensor with storage",
        "other optimizer": "optimizer: parameter 0 of group 0, of shape (2, 2), is none of the model's",
        "state": f"{NORM}: state rows: expected a number, or a tensor of its parameter's shape",
        "disk": "rank 1: OSError: [Errno 28] No space left on device",
        "disk again": "rank 1: OSError: [Errno 28] No space left on device",
    }.items():
        assert words in ranks[0][name], name
    assert not (tmp_path / "x").exists()
    check_saves(tmp_path)


def die_while_saving(root: Path, out: Path) -> None:
    mesh = init_mesh(tp=2)
    model = load(root / "llama", mesh)
    if mesh.tp.rank == 1:
        checkpoint_storage.save_file = lambda *args: os._exit(9)
    save(model, out / "run", mesh)


def save_again(root: Path, out: Path) -> str:
    mesh = init_mesh(tp=2)
    model = load(root / "llama", mesh)
    said = failure(lambda: restore(model, out / "run", mesh))
    save(model, out / "run", mesh)
    restore(model, out / "run", mesh)
    return said


def test_a_rank_that_dies_leaves_no_checkpoint(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError):
        launch(die_while_saving, 2, root, tmp_path, threads=1, timeout_s=30)
    assert not (tmp_path / "run").exists()
    for said in launch(save_again, 2, root, tmp_path, threads=1):
        assert "run: no such folder; saving it was interrupted" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
