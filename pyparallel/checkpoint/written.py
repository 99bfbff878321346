"""The list that we leave in a folder, of the files in it that are ours to replace."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.paths import is_plain
from pyparallel.checkpoint.sharded import INDEX

LIST = ".pyparallel.json"
# A list of names: more is none of ours.
_MOST_BYTES = 16 << 20
# What was beside the tensors before there was a list.
_BESIDE = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")


def write_list(folder: Path, names: Sequence[str], *, finished: bool) -> None:
    """Say which files of ``folder`` are ours, in one step."""
    content = json.dumps({"format": 1, "finished": finished, "files": list(names)}, indent=1)
    beside = folder / f"{LIST}.{os.getpid()}"
    with beside.open("x") as file:
        file.write(content + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / LIST)


def names_of(folder: Path) -> tuple[bool, set[str]]:
    """Whether a folder of ours was finished, and our files in it, the list aside."""
    content = _content(folder / LIST)
    if content is None:
        return True, (own_files(folder) or set()) - {LIST}
    return content[0], content[1]


def own_files(folder: Path) -> set[str] | None:
    """The names of what we wrote in ``folder``, our list's too; None where nothing says that we did."""
    content = _content(folder / LIST)
    if content is not None:
        return {*content[1], LIST}
    if not (folder / INDEX).is_file():
        return None
    # A checkpoint of before there was a list: its index names the tensors' files.
    try:
        files = json.loads((folder / INDEX).read_text())["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{folder / INDEX}: not a whole index; remove the folder yourself, or choose another"
        ) from None
    named = [name for name in files if is_plain(name)]
    beside = [path.name for path in folder.glob("tokenizer*") if path.is_file()]
    return {INDEX, *named, *beside, *_BESIDE}


def _content(file: Path) -> tuple[bool, set[str]] | None:
    """(finished, names) of a list of ours; None where it is none."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return None
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != 1:
        return None
    names, finished = content.get("files"), content.get("finished")
    if not isinstance(names, list) or not isinstance(finished, bool):
        return None
    # A name that leads elsewhere is none that we wrote.
    return (finished, set(names)) if all(map(is_plain, names)) else None
