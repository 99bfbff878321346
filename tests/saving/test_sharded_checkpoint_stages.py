"""Checkpoints of pipeline stages, and what saving and restoring takes of a rank's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pyparallel.checkpoint import storage as checkpoint_storage
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.saving.export import export
from pyparallel.saving.save import restore, save
from pyparallel.testing import poisoned_empty
from pyparallel.training.data import data_parallel
from tests.saving.test_sharded_checkpoint import assert_same, assert_state, poison, with_state
from tests.transformers_models import build

NAMES = ("llama tied", "llama", "gpt2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of four layers and more."""
    path = tmp_path_factory.mktemp("models")
    for name in NAMES:
        build(name, num_hidden_layers=4).save_pretrained(path / name)
    return path


def across_stages(root: Path, out: Path) -> None:
    two, one, long = init_mesh(pp=2, tp=2), init_mesh(dp=2, tp=2), init_mesh(pp=4)
    with poisoned_empty():
        for name in NAMES:
            stage = load(root / name, two)
            save(stage, out / f"two {name}", two, optimizer=with_state(stage))
            whole = load(root / name, one)
            save(whole, out / f"one {name}", one, optimizer=with_state(whole))
            for mesh, folder in ((one, "two"), (two, "one"), (long, "two"), (two, "two")):
                what = f"{name}: {folder} to {mesh}"
                model = poison(load(root / name, mesh))
                optimizer = torch.optim.AdamW(model.parameters())
                restore(model, out / f"{folder} {name}", mesh, optimizer=optimizer)
                assert_same(model, load(root / name, mesh), what)
                assert_state(optimizer, what)
            # Several stages a rank, and there and back again: rank 0 has both ends of the model.
            chunks = nn.ModuleList(poison(part) for part in load_v(root / name, two))
            optimizer = torch.optim.AdamW(chunks.parameters())
            restore(list(chunks), out / f"one {name}", two, optimizer=optimizer)
            for part, truth in zip(chunks, load_v(root / name, two), strict=True):
                assert_same(part, truth, f"{name}: one to four stages")
            assert_state(optimizer, f"{name}: one to four stages")
            save(list(chunks), out / f"four {name}", two, optimizer=optimizer)
            export(list(chunks), out / f"export {name}", two)

        # The data-parallel wrappers of a training run.
        for engine in ("fsdp", "ddp"):
            model = data_parallel(load(root / "llama", one), one, engine=engine)
            save(model, out / engine, one, optimizer=with_state(model))
            stage = poison(load(root / "llama", two))
            optimizer = torch.optim.AdamW(stage.parameters())
            restore(stage, out / engine, two, optimizer=optimizer)
            assert_same(stage, load(root / "llama", two), engine)
            assert_state(optimizer, engine)


def load_v(folder: Path, mesh: Mesh) -> list[nn.Module]:
    return load_stages(folder, mesh, chunks=2, order="v")


def stages_of_transformers(root: Path, out: Path) -> None:
    """transformers' own model, whose tied head is a copy on the last stage."""
    two, one = init_mesh(pp=2, tp=2), init_mesh(dp=2, tp=2)
    with poisoned_empty():
        for name in ("llama tied", "gpt2"):
            for source, target in ((two, one), (one, two)):
                folder = out / f"transformers {name} {source.pp.size}"
                model = load(root / name, source, transformers=True)
                save(model, folder, source, optimizer=with_state(model))
                model = poison(load(root / name, target, transformers=True))
                optimizer = torch.optim.AdamW(model.parameters())
                restore(model, folder, target, optimizer=optimizer)
                what = f"{name}: pp={source.pp.size} to pp={target.pp.size}"
                assert_same(model, load(root / name, target, transformers=True), what)
                assert_state(optimizer, what)


def test_pp_2_to_1_to_4(root: Path, tmp_path: Path) -> None:
    launch(across_stages, 4, root, tmp_path, threads=1)
    launch(stages_of_transformers, 4, root, tmp_path, threads=1)
    for name in NAMES:
        original = open_checkpoint(root / name)
        numbers = 0
        for shape in original.shapes.values():
            numbers += torch.Size(shape).numel()
        for folder in ("one", "two", "four"):
            # A tied embedding is on two stages, and is kept once.
            stored = open_checkpoint(tmp_path / f"{folder} {name}").index.tensors.values()
            boxes = [chunk.sizes for tensor in stored for chunk in tensor.chunks]
            assert sum(torch.Size(sizes).numel() for sizes in boxes) == 3 * numbers
        exported = open_checkpoint(tmp_path / f"export {name}")
        assert exported.shapes == original.shapes


def peaks(root: Path, out: Path) -> dict[str, int]:
    """Bytes that saving, restoring and exporting add to a rank's peak memory."""
    mesh = init_mesh(tp=3)
    checkpoint_storage.COPIED_BYTES = 1 << 20
    tiny = load(root / "tiny", mesh)
    # What the code itself takes is not the weights'.
    save(tiny, out / "tiny", mesh)
    restore(tiny, out / "tiny", mesh)
    export(tiny, out / "tiny export", mesh)
    model = load(root / "big", mesh)
    found = {}
    for name, work in (
        ("save", lambda: save(model, out / "big", mesh)),
        ("restore", lambda: restore(model, out / "big", mesh)),
        ("export", lambda: export(model, out / "export", mesh, max_file_bytes=30_000_000)),
    ):
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        work()
        found[name] = _peak() - before
    return found


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_peak_memory(tmp_path: Path) -> None:
    """A 105 MB model whose largest tensor is 8 MB; 6 MB are left to the allocator."""
    build("llama").save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 576, "intermediate_size": 2048, "vocab_size": 3640, "head_dim": 64}
    build("llama", num_hidden_layers=5, **sizes).save_pretrained(tmp_path / "big")
    largest = 3640 * 576 * 4
    mapped = 16 << 20
    for found in launch(peaks, 3, tmp_path, tmp_path / "out", threads=1):
        # A third of the largest tensor is a rank's largest box.
        assert found["save"] <= (1 << 20) + largest / 3 + 6e6
        assert found["restore"] <= mapped + largest / 3 + 6e6
        assert found["export"] <= mapped + 2 * largest + 6e6
