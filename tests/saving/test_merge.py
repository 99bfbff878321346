"""What ``merge`` makes of hosts' parts, and that it touches no file but its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyparallel.checkpoint.boxes import Stored
from pyparallel.checkpoint.grid import Grid
from pyparallel.checkpoint.index import INDEX, SAVE, Index
from pyparallel.checkpoint.sharded import ShardedCheckpoint
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.checkpoint.storage import file_name
from pyparallel.cut.shard import REPLICATED
from pyparallel.saving.merge import merge


def write_parts(folder: Path, value: torch.Tensor, save: str | None = None) -> list[Path]:
    """A matrix of which each of two hosts has half the rows."""
    sizes = {}
    # As long without a save's name as with it.
    metadata = {SAVE: save} if save else {SAVE[::-1]: "0" * 16}
    parts = [folder / f"host-{rank}" for rank in range(2)]
    for rank, (part, rows) in enumerate(zip(parts, value.chunk(2), strict=True)):
        part.mkdir(parents=True)
        file = part / file_name(rank, 0, "")
        save_file({f"a@{rank * len(rows)},0": rows.clone()}, file, metadata)
        sizes[file.name] = file.stat().st_size
    height, width = value.shape
    grid = Grid(((0, height // 2, height), (0, width)), (0, 1), list(sizes))
    stored = Stored(grid.shape, value.dtype, grid)
    index = Index({"a": stored}, sizes, {"optimizer": None, "extra": {}}, save)
    (parts[0] / INDEX).write_text(index.to_json())
    (parts[0] / "config.json").write_text("{}")
    return parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return write_parts(tmp_path, torch.arange(24.0).view(4, 6))


def read(folder: Path) -> torch.Tensor:
    return ShardedCheckpoint(folder).read("a", REPLICATED, 0)


@pytest.mark.parametrize("linked", [True, False])
def test_a_name_that_leads_elsewhere_is_refused(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """``merge`` wrote it there, over a file that lay beside its folder."""
    if not linked:
        monkeypatch.setattr("os.link", no_links)
    name = "../rank_00001_00.safetensors"
    index = json.loads((parts[0] / INDEX).read_text())
    index["files"][name] = index["files"].pop("rank_00001_00.safetensors")
    (parts[0] / INDEX).write_text(json.dumps(index))
    # Beside one part alone.
    (tmp_path / "first").mkdir()
    shutil.move(parts[0], tmp_path / "first")
    shutil.move(parts[1] / "rank_00001_00.safetensors", tmp_path)
    other = tmp_path / "out"
    other.mkdir()
    (other / "rank_00001_00.safetensors").write_text("another's")
    with pytest.raises(CheckpointError, match=r"files: expected a name inside .* got '\.\./rank"):
        merge([tmp_path / "first/host-0", parts[1]], other / "whole")
    assert (other / "rank_00001_00.safetensors").read_text() == "another's"
    assert [path.name for path in other.iterdir()] == ["rank_00001_00.safetensors"]


def test_a_file_of_a_name_of_ours_is_not_overwritten(parts: list[Path], tmp_path: Path) -> None:
    """The list of what we wrote lies in the new folder before the files come."""
    index = json.loads((parts[0] / INDEX).read_text())
    file = next(parts[1].iterdir())
    index["files"][".pyparallel.json"] = file.stat().st_size
    (parts[0] / INDEX).write_text(json.dumps(index))
    shutil.copy(file, parts[1] / ".pyparallel.json")
    with pytest.raises(CheckpointError, match=r"\.pyparallel\.json: file exists"):
        merge(parts, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("earlier", ["1" * 16, None])
def test_parts_of_two_saves_are_no_checkpoint(tmp_path: Path, earlier: str | None) -> None:
    """Their files have one name and size at every step; an older version's name no save."""
    steps = [
        write_parts(tmp_path / name, torch.full((4, 6), value), save)
        for name, value, save in (("earlier", 1.0, earlier), ("later", 2.0, "2" * 16))
    ]
    for number, parts in enumerate(steps):
        mixed = [parts[0], steps[1 - number][1]]
        with pytest.raises(CheckpointError, match=r"rank_00001_00.*: expected a file of the save"):
            merge(mixed, tmp_path / "mixed")
        assert not (tmp_path / "mixed").exists()
        merge(parts, tmp_path / f"whole-{number}")
        assert torch.equal(read(tmp_path / f"whole-{number}"), torch.full((4, 6), number + 1.0))
    file = "rank_00001_00.safetensors"
    shutil.copy(tmp_path / "whole-0" / file, tmp_path / "copied")
    (tmp_path / "whole-1" / file).unlink()
    shutil.move(tmp_path / "copied", tmp_path / "whole-1" / file)
    if earlier is not None:
        with pytest.raises(CheckpointError, match=r"got one of '1111111111111111'; put together"):
            read(tmp_path / "whole-1")


def check_saves(folder: Path) -> None:
    """What hosts have of two saves, "one" and "two", is not put together; "weights" names no save."""
    assert "save" not in json.loads((folder / "weights" / INDEX).read_text())
    for step in ("one", "two"):
        other = folder / f"{step}-other"
        other.mkdir()
        shutil.move(folder / step / "rank_00001_00.safetensors", other)
    with pytest.raises(CheckpointError, match="expected a file of the save"):
        merge([folder / "two", folder / "one-other"], folder / "mixed")
    assert merge([folder / "two", folder / "two-other"], folder / "merged") == 2
    ShardedCheckpoint(folder / "merged").read("model.norm.weight", REPLICATED, 0)


def no_links(*_: object, **__: object) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("linked", [True, False])
def test_a_part_keeps_its_files_modes(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """A link is the part's own file: ``merge`` made one of 0600 everyone's to read."""
    if not linked:
        monkeypatch.setattr("os.link", no_links)
    for part in parts:
        for file in part.iterdir():
            file.chmod(0o600)
    merge(parts, tmp_path / "whole")
    usual = (tmp_path / "whole/.pyparallel.json").stat().st_mode & 0o777
    assert usual != 0o600
    for part in parts:
        for file in part.iterdir():
            assert file.stat().st_mode & 0o777 == 0o600, file
            found = tmp_path / "whole" / file.name
            assert found.samefile(file) == linked
            assert found.stat().st_mode & 0o777 == (0o600 if linked else usual), found


def test_a_part_of_links_is_merged(parts: list[Path], tmp_path: Path) -> None:
    """What appears has the files, not links of the part's that lead nowhere from there."""
    file = parts[1] / "rank_00001_00.safetensors"
    shutil.move(file, tmp_path / "kept")
    file.symlink_to("../kept")
    merge(parts, tmp_path / "deep/er/whole")
    assert (tmp_path / "deep/er/whole" / file.name).samefile(tmp_path / "kept")
    assert not (tmp_path / "deep/er/whole" / file.name).is_symlink()
    assert torch.equal(read(tmp_path / "deep/er/whole"), torch.arange(24.0).view(4, 6))
