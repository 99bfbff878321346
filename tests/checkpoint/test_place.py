"""Where save and export write: nothing that others wrote is lost, at no moment is nothing there."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

from pyparallel.checkpoint.paths import resolve
from pyparallel.checkpoint.place import Place, left_behind
from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.checkpoint.written import LIST
from pyparallel.cli import main
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.saving.export import export, export_checkpoint
from pyparallel.saving.save import restore, save
from tests.transformers_models import build

NOTES = "what somebody wrote"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def foreign(folder: Path) -> dict[str, bytes]:
    """A folder of somebody's, with a file and a folder in it."""
    (folder / ".git").mkdir(parents=True)
    (folder / ".git/HEAD").write_text(NOTES)
    (folder / "notes.txt").write_text(NOTES)
    return tree(folder)


def targets(root: Path) -> dict[str, tuple[str, Path]]:
    """Names of targets: how they are given, and the folder whose content has to stay as it is."""
    made = {}
    for name in ("plain", "empty name", "dot", "dotdot", "through dots", "slash"):
        foreign(root / name / "place")
    made["plain"] = str(root / "plain/place"), root / "plain"
    made["dotdot"] = str(root / "dotdot/place/.."), root / "dotdot"
    made["through dots"] = str(root / "through dots/x/../place"), root / "through dots"
    made["slash"] = str(root / "slash/place") + "/", root / "slash"
    made["dot"] = ".", root / "dot/place"
    made["empty name"] = "", root / "empty name/place"
    foreign(root / "linked/real")
    (root / "linked/link").symlink_to(root / "linked/real")
    made["link"] = str(root / "linked/link"), root / "linked"
    (root / "file").mkdir()
    (root / "file/place").write_text(NOTES)
    made["file"] = str(root / "file/place"), root / "file"
    (root / "dangling").mkdir()
    (root / "dangling/place").symlink_to(root / "nowhere")
    made["dangling link"] = str(root / "dangling/place"), root / "dangling"
    return made


def save_to(model_folder: Path, root: Path) -> dict[str, str]:
    mesh = init_mesh(tp=2)
    model = load(model_folder, mesh)
    told = {}
    for name, (given, folder) in targets_of(root).items():
        os.chdir(folder if given in ("", ".") else root)
        for kind, work in (
            ("save", lambda: save(model, given, mesh, overwrite=True)),  # noqa: B023
            ("export", lambda: export(model, given, mesh, overwrite=True)),  # noqa: B023
        ):
            try:
                work()
            except CheckpointError as error:
                told[f"{kind} {name}"] = str(error)
    return told


def targets_of(root: Path) -> dict[str, tuple[str, Path]]:
    return {
        name: (given, Path(folder))
        for name, (given, folder) in json.loads((root / "targets.json").read_text()).items()
    }


def test_what_others_wrote_is_refused_before_the_first_byte(
    model_folder: Path, tmp_path: Path
) -> None:
    made = targets(tmp_path)
    listed = {name: (given, str(folder)) for name, (given, folder) in made.items()}
    (tmp_path / "targets.json").write_text(json.dumps(listed))
    before = {name: tree(folder) for name, (_, folder) in made.items()}
    for told in launch(save_to, 2, model_folder, tmp_path, threads=1):
        assert told.keys() == {f"{kind} {name}" for kind in ("save", "export") for name in made}
        assert all("\n" not in said for said in told.values())
        for name, words in {
            "plain": "holds files that pyparallel did not write (.git, notes.txt); choose",
            "link": "is a link; give the folder it leads to",
            "file": "expected a folder, or nothing; a file is there",
            "empty name": "folder: expected the name of a folder, got ''",
        }.items():
            assert words in told[f"save {name}"] and words in told[f"export {name}"]
    for name, (_, folder) in made.items():
        assert tree(folder) == before[name], name
        assert not [path for path in folder.rglob("*") if "writing" in path.name]


def test_the_command_keeps_what_it_reads_and_where_it_stands(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source = tmp_path / "source"
    export_checkpoint(open_checkpoint(model_folder), source)
    before = tree(source)
    arguments = ["export", "--checkpoint", str(source), "--overwrite", "--out"]
    assert main([*arguments, str(source)]) == 2
    assert "is what is read; it can't be replaced" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(source)
    assert main([*arguments, str(tmp_path / "link")]) == 2
    assert tree(source) == before
    here = tmp_path / "here"
    kept = foreign(here)
    monkeypatch.chdir(here)
    for given in (".", "../here", str(here)):
        assert main([*arguments, given]) == 2
        assert "did not write" in capsys.readouterr().err
    assert tree(here) == kept


def write_folder(folder: Path, model_folder: Path, **options: object) -> None:
    export_checkpoint(open_checkpoint(model_folder), folder, overwrite=True, **options)


def test_names_of_others_beside_the_place_stay(model_folder: Path, tmp_path: Path) -> None:
    for name in (".run.old", ".run.unfinished", ".run.boxes", ".run.0123456789abcdef.writing"):
        foreign(tmp_path / name)
    before = tree(tmp_path)
    for _ in range(2):
        write_folder(tmp_path / "run", model_folder)
    ours = tree(tmp_path / "run")
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("run/")} == before
    assert LIST in ours and "model.safetensors" in ours


def several(folder: Path, model_folder: Path) -> None:
    write_folder(folder, model_folder, max_file_bytes=20_000)


def test_with_others_files_in_it_only_ours_are_replaced(model_folder: Path, tmp_path: Path) -> None:
    """From one file to several, to others, and back: always whole, and the others' stay."""
    folder = tmp_path / "run"
    write_folder(folder, model_folder)
    kept = foreign(folder / "sub")
    (folder / "notes.txt").write_text(NOTES)
    truth = open_checkpoint(model_folder)
    for write in (several, several, write_folder, several):
        write(folder, model_folder)
        assert (folder / "notes.txt").read_text() == NOTES and tree(folder / "sub") == kept
        found = open_checkpoint(folder)
        assert found.shapes == truth.shapes
        listed = set(json.loads((folder / LIST).read_text())["files"])
        assert {p.name for p in folder.iterdir()} == {*listed, LIST, "notes.txt", "sub"}
    # A name of ours that somebody took is not ours any more.
    write_folder(folder, model_folder)
    content = json.loads((folder / LIST).read_text())
    content["files"].remove("config.json")
    (folder / LIST).write_text(json.dumps(content))
    before = tree(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: is not one that pyparallel wrote"):
        several(folder, model_folder)
    assert tree(folder) == before
    # Nor does a list lead elsewhere.
    content["files"] = ["../victim"]
    (tmp_path / "victim").write_text(NOTES)
    (folder / LIST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="did not write"):
        several(folder, model_folder)
    assert (tmp_path / "victim").read_text() == NOTES


def overwrite_beside_notes(model_folder: Path, out: Path) -> None:
    mesh = init_mesh(tp=2)
    model = load(model_folder, mesh)
    for number in range(3):
        save(model, out / "run", mesh, overwrite=True, extra={"number": number})
        if mesh.tp.rank == 0:
            (out / "run/notes.txt").write_text(NOTES)
        torch.distributed.barrier()
        assert restore(model, out / "run", mesh) == {"number": number}
    export(model, out / "run", mesh, overwrite=True)
    load(out / "run", mesh)


def test_save_over_a_checkpoint_with_notes(model_folder: Path, tmp_path: Path) -> None:
    launch(overwrite_beside_notes, 2, model_folder, tmp_path, threads=1)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "notes.txt",
        LIST,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def save_old(model_folder: Path, out: Path) -> None:
    mesh = init_mesh(tp=2)
    model = load(model_folder, mesh)
    save(model, out / "run", mesh)
    if mesh.tp.rank == 0:
        # As versions before the list wrote it.
        (out / "run" / LIST).unlink()
    torch.distributed.barrier()
    save(model, out / "run", mesh, overwrite=True, extra={"a": 1})
    assert restore(model, out / "run", mesh) == {"a": 1}


def test_checkpoints_from_before_the_list_are_ours(model_folder: Path, tmp_path: Path) -> None:
    launch(save_old, 2, model_folder, tmp_path, threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_resolve(tmp_path: Path) -> None:
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real/inner")
    assert resolve(tmp_path / "link/../name") == tmp_path / "real/name"
    assert resolve(str(tmp_path / "real/./name/")) == tmp_path / "real/name"
    assert resolve(tmp_path / "real/inner/..") == tmp_path / "real"


def test_ranks_that_ask_at_once_all_hear_of_an_interrupted_run(tmp_path: Path) -> None:
    """Nobody takes another's question, which is a lock as well, for a writer that lives."""
    folder = tmp_path / "run"
    writer = Place(folder, overwrite=False)
    assert left_behind(folder) == ""
    # As the kernel does for a writer that dies.
    os.close(writer._lock)
    asking = os.open(writer.working, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    try:
        assert left_behind(folder) == "; saving it was interrupted"
    finally:
        os.close(asking)
