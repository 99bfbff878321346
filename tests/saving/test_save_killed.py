"""Killed while a folder is replaced: at every moment the old one or the new one is there, whole."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest

from pyparallel.checkpoint import place as checkpoint_place
from pyparallel.checkpoint.paths import EXCHANGE
from pyparallel.checkpoint.place import Place
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.launch import RankError, launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.saving.export import export_checkpoint
from pyparallel.saving.save import restore
from tests.checkpoint.test_place import NOTES, several, write_folder
from tests.transformers_models import build


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(path)
    return path


def dying(step: str, count: int, model_folder: Path, folder: Path, kind: str) -> None:
    """Overwrites ``folder``, and is killed at the ``count``-th call of a step."""
    owner, name = (os, step[3:]) if step.startswith("os.") else (checkpoint_place, step)
    work, calls = getattr(owner, name), itertools.count(1)

    def run(*args: object, **options: object) -> object:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **options)

    setattr(owner, name, run)
    (several if kind == "several" else write_folder)(folder, model_folder)


def killed_at(*args: object) -> bool:
    """Whether the step was reached."""
    try:
        launch(dying, 1, *args, threads=1)
    except RankError:
        return True
    return False


@pytest.mark.parametrize("notes", [False, True])
@pytest.mark.parametrize(
    "step", [("rename", 1), ("to_disk", 3), ("to_disk", 6), ("os.replace", 2), ("_remove_old", 1)]
)
def test_killed_at_any_step_one_of_them_is_whole(
    model_folder: Path, tmp_path: Path, step: tuple[str, int], notes: bool
) -> None:
    folder = tmp_path / "run"
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "before")
    export_checkpoint(open_checkpoint(tmp_path / "before"), folder)
    if notes:
        (folder / "notes.txt").write_text(NOTES)
    # With notes in it nothing changes places.
    assert killed_at(*step, model_folder, folder, "one") or notes
    shapes = open_checkpoint(folder).shapes
    assert shapes in (
        open_checkpoint(tmp_path / "before").shapes,
        open_checkpoint(model_folder).shapes,
    )
    # The next run removes what this one left.
    write_folder(folder, model_folder)
    assert open_checkpoint(folder).shapes == open_checkpoint(model_folder).shapes
    assert {path.name for path in tmp_path.iterdir()} == {"run", "before"}
    assert (folder / "notes.txt").exists() == notes


def test_killed_while_files_change_one_by_one(model_folder: Path, tmp_path: Path) -> None:
    """Of several files, others' among them: the index is the moment; before and after, all is whole."""
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "before")
    old, new = (open_checkpoint(p).shapes for p in (tmp_path / "before", model_folder))
    seen = set()
    for count in range(3, 13):
        folder = tmp_path / "run"
        several(folder, tmp_path / "before")
        (folder / "notes.txt").write_text(NOTES)
        killed_at("os.replace", count, model_folder, folder, "several")
        shapes = open_checkpoint(folder).shapes
        assert shapes in (old, new), count
        seen.add(shapes == new)
        shutil.rmtree(folder)
    assert seen == {False, True}


def test_a_file_system_without_exchange(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = checkpoint_place.rename

    def without(old: Path, new: Path, flags: int) -> None:
        if flags == EXCHANGE:
            raise OSError(22, "Invalid argument")
        rename(old, new, flags)

    monkeypatch.setattr(checkpoint_place, "rename", without)
    write_folder(tmp_path / "run", model_folder)
    several(tmp_path / "run", model_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    # Killed between its two renames: it is told where the old one is, and the next run has it back.
    old = tmp_path / ".run.0123456789abcdef.replaced"
    (tmp_path / "run").rename(old)
    with pytest.raises(RankError, match=r"no such .*; the one before lies whole in \.run\.01"):
        launch(restore_one, 1, model_folder, tmp_path / "run", threads=1)
    place = Place(tmp_path / "run", overwrite=True)
    assert open_checkpoint(tmp_path / "run").shapes == open_checkpoint(model_folder).shapes
    place.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def restore_one(model_folder: Path, folder: Path) -> None:
    mesh = init_mesh(tp=1)
    restore(load(model_folder, mesh), folder, mesh)
