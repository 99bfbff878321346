"""Targets of save and export: nothing that others wrote is lost, whatever is given as the place."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from pyparallel.checkpoint import place as checkpoint_place
from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.checkpoint.written import LIST
from pyparallel.launch import RankError, launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.saving.export import export, export_checkpoint
from pyparallel.saving.save import save
from tests.campaigns.rows import Row

KINDS = ("save", "export", "checkpoint")
# What stands at the place.
PLACES = (
    "nothing",
    "empty",
    "ours",
    "ours, notes",
    "foreign",
    "file",
    "link to ours",
    "link to foreign",
    "dangling link",
    "fifo",
    "lying list",
    "source",
)
# How the place is called.
NAMES = ("plain", "dots", "dot", "slash", "through a link", "empty", "long", "odd")
# Calls of the steps at which the writer may be killed.
STEPS = (("rename", 1), ("to_disk", 4), ("replace", 2), ("replace", 4), ("_remove_old", 1))
NOTES = "what somebody wrote"


def campaign(seed: int, count: int) -> list[Row]:
    """``count`` targets, some with a kill on the way; the same of the same seed."""
    # A rank imports this file too, and need not wait for transformers.
    from tests.transformers_models import build

    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model"
        build("llama", num_hidden_layers=1).save_pretrained(source)
        return [_one(seed, number, source, Path(place) / str(number)) for number in range(count)]


def _one(seed: int, number: int, source: Path, root: Path) -> Row:
    chance = random.Random(f"{seed}/{number}")
    kind, stands = chance.choice(KINDS), chance.choice(PLACES)
    called, overwrite = chance.choice(NAMES), chance.random() < 0.8
    killed = chance.choice(STEPS) if chance.random() < 0.3 else None
    own = root / "source"
    shutil.copytree(source, own)
    _others(root / "others")
    target = root / "place" / {"long": "n" * 240, "odd": "ä b"}.get(called, "run")
    target.parent.mkdir()
    _stand(stands, target, own, root)
    given, here = _called(called, target, root)
    before, whole = _foreign(root), _is_whole(target)
    started, told = time.monotonic(), ""
    try:
        launch(_write, 1, kind, str(own), given, here, overwrite, killed, threads=1)
    except (RankError, CheckpointError) as error:
        told = str(error).splitlines()[0]
    seconds = time.monotonic() - started
    what = f"seed {seed}/{number}: {kind} to {given!r}, overwrite={overwrite}, {killed}: {told}"
    verdict = "ok"
    if (lost := _lost(before, root)) or (whole and not _is_whole(target)):
        verdict, what = "lost", f"{what}; lost {lost or 'the checkpoint that was there'}"
    elif told and killed is None and "CheckpointError" not in told:
        verdict = "wrong"
    elif killed is None and (left := _left(root)):
        verdict, what = "left", f"{what}; left {left}"
    shutil.rmtree(root)
    return Row("paths", kind, stands, verdict, "", seconds, what)


def _write(
    kind: str, source: str, given: str, here: str, overwrite: bool, killed: tuple | None
) -> None:
    mesh = init_mesh(tp=1)
    model = load(source, mesh)
    os.chdir(here)
    if killed is not None:
        _die_at(*killed)
    if kind == "save":
        save(model, given, mesh, overwrite=overwrite)
    elif kind == "export":
        export(model, given, mesh, overwrite=overwrite)
    else:
        export_checkpoint(open_checkpoint(source), given, overwrite=overwrite)


def _die_at(step: str, call: int) -> None:
    owner = os if step == "replace" else checkpoint_place
    work, calls = getattr(owner, step), []

    def run(*args: object, **options: object) -> object:
        calls.append(step)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **options)

    setattr(owner, step, run)


def _others(folder: Path) -> None:
    (folder / ".git").mkdir(parents=True)
    (folder / ".git/HEAD").write_text(NOTES)
    (folder / "notes.txt").write_text(NOTES)


def _stand(what: str, target: Path, source: Path, root: Path) -> None:
    if what == "empty":
        target.mkdir()
    elif what in ("ours", "ours, notes", "lying list"):
        export_checkpoint(open_checkpoint(source), target)
        if what != "ours":
            (target / "notes.txt").write_text(NOTES)
        if what == "lying list":
            content = json.loads((target / LIST).read_text())
            content["files"] += ["../../others/notes.txt"]
            (target / LIST).write_text(json.dumps(content))
    elif what == "foreign":
        _others(target)
    elif what == "file":
        target.write_text(NOTES)
    elif what == "fifo":
        os.mkfifo(target)
    elif what == "source":
        target.symlink_to(source)
    elif what.startswith("link"):
        real = root / "real"
        if "foreign" in what:
            _others(real)
        else:
            export_checkpoint(open_checkpoint(source), real)
        target.symlink_to(real)
    elif what == "dangling link":
        target.symlink_to(root / "nowhere")


def _called(how: str, target: Path, root: Path) -> tuple[str, str]:
    """The target as it is given, and the current folder."""
    if how == "dots":
        return f"{target.parent}/x/../{target.name}", str(root)
    if how == "slash":
        return f"{target}/", str(root)
    if how == "through a link":
        (root / "way").symlink_to(target.parent)
        return str(root / "way" / target.name), str(root)
    if how in ("dot", "empty") and target.is_dir():
        return ("." if how == "dot" else ""), str(target)
    return str(target), str(root)


def _foreign(root: Path) -> dict[str, str]:
    """Every file and link that somebody else made, by where it lies."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and (path.read_bytes() == NOTES.encode() or name.startswith("source/")):
            found[name] = path.read_bytes().hex()
    return found


def _lost(before: dict[str, str], root: Path) -> list[str]:
    now = _foreign(root)
    return [name for name, content in before.items() if now.get(name) != content]


def _is_whole(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(open_checkpoint(folder).shapes)
    except CheckpointError:
        return False


def _left(root: Path) -> list[str]:
    names = [path.name for path in root.rglob("*")]
    return [n for n in names if n.endswith((".writing", ".replaced")) or ".json." in n]
