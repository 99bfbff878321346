"""What save and export write: one mode by umask, on disk before it has its name, errors with a path."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from pyparallel.checkpoint import place as checkpoint_place
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.saving.export import export
from pyparallel.saving.save import save
from tests.checkpoint.somebody_else import as_somebody_else, is_root
from tests.checkpoint.test_place import several, write_folder
from tests.transformers_models import build


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(path)
    return path


def save_with_mask(model_folder: Path, out: Path) -> None:
    os.umask(0o027)
    mesh = init_mesh(tp=2)
    model = load(model_folder, mesh)
    save(model, out / "saved", mesh)
    export(model, out / "exported", mesh)


def test_one_mode_by_umask(model_folder: Path, tmp_path: Path) -> None:
    launch(save_with_mask, 2, model_folder, tmp_path, threads=1)
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert set(modes.values()) == {0o640}, modes


def test_export_to_a_full_disk_names_the_path(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[export.__module__], "write_safetensors", full)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: no space left on device"
    ) as told:
        write_folder(tmp_path / "run", model_folder)
    assert str(tmp_path) in str(told.value)
    assert not list(tmp_path.iterdir())


def test_tensors_are_on_disk_before_the_name_is_theirs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, renamed = [], []
    to_disk, rename = checkpoint_place.to_disk, checkpoint_place.rename
    monkeypatch.setattr(
        checkpoint_place, "to_disk", lambda path: (synced.append(path.name), to_disk(path))
    )

    def renaming(*args: object) -> None:
        renamed.append(list(synced))
        rename(*args)

    monkeypatch.setattr(checkpoint_place, "rename", renaming)
    several(tmp_path / "run", model_folder)
    (before,) = renamed
    tensors = {path.name for path in (tmp_path / "run").glob("*.safetensors")}
    assert tensors and tensors | {"config.json"} <= set(before)
    assert synced[-1] == tmp_path.name


def test_permission_denied_is_no_missing_file(model_folder: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    shutil.copytree(model_folder, closed / "llama")
    # To others where root asks as one, to its owner elsewhere.
    closed.chmod(0o700 if is_root() else 0)
    imports = (
        "import pyparallel.saving.export\n"
        "from pyparallel.checkpoint.source import CheckpointError, open_checkpoint\n"
        "from pyparallel.checkpoint.place import Place"
    )
    code = (
        "for work in (open_checkpoint, lambda path: Place(path, overwrite=True)):\n"
        "    try: work(sys.argv[1])\n"
        "    except CheckpointError as error: print(error)"
    )
    try:
        lines = as_somebody_else(imports, code, closed / "llama")
    finally:
        closed.chmod(0o700)
    assert len(lines) == 2
    assert all("permission denied" in line.lower() for line in lines), lines
