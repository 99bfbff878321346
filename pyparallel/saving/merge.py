"""``merge``: what hosts wrote by ``save(per_host=True)``, each its own part, as one checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pyparallel.checkpoint.format import CheckpointError, open_safetensors, regular_file
from pyparallel.checkpoint.index import INDEX, read_index
from pyparallel.checkpoint.paths import naming, resolve, to_disk
from pyparallel.checkpoint.place import Place
from pyparallel.checkpoint.written import LIST


def merge(parts: Sequence[str | Path], folder: str | Path, *, overwrite: bool = False) -> int:
    """Put the hosts' parts of a checkpoint together; needs no ranks.

    Files are linked where the file system can, and copied elsewhere; the parts stay as they are, their
    files' modes too.

    Args:
        parts: each host's folder, wherever it lies now, in any order.
        folder: what appears, whole.
        overwrite: as :func:`pyparallel.save` takes it.

    Returns:
        The number of files of tensors.

    Raises:
        CheckpointError: no part or several have an index; a file that it names is in no part or in
            several, not whole, or of another save.
    """
    folders = [resolve(part) for part in parts]
    indexed = [part for part in folders if (part / INDEX).is_file()]
    if len(indexed) != 1:
        raise CheckpointError(
            f"merge: expected one part with {INDEX}, that of rank 0's host, got {len(indexed)} among "
            f"{len(folders)}; give every host's folder once"
        )
    index = read_index(indexed[0])
    files = index.files
    found = {name: _found(name, size, folders) for name, size in files.items()}
    for path in found.values():
        with open_safetensors(path) as opened:
            index.check_save(path, opened.metadata())
    place = Place(folder, overwrite=overwrite)
    try:
        beside = {
            path.name: path
            for path in indexed[0].iterdir()
            if path.name not in (*files, LIST) and path.is_file()
        }
        for name, path in {**found, **beside}.items():
            with naming(path):
                _link_or_copy(path, place.working / name)
        place.appear(INDEX)
    finally:
        place.close()
    return len(files)


def _found(name: str, size: int, folders: Sequence[Path]) -> Path:
    """The file of this name in whichever part has it."""
    having = [folder / name for folder in folders if (folder / name).is_file()]
    if len(having) != 1:
        where = f"in {len(having)} of the {len(folders)} parts"
        raise CheckpointError(f"merge: {name}: expected in one part, got it {where}")
    held = regular_file(having[0])
    if held != size:
        raise CheckpointError(f"{having[0]}: expected {size} bytes, got {held}; it is not whole")
    return having[0]


def _link_or_copy(path: Path, to: Path) -> None:
    with suppress(OSError):
        # The file itself: Linux makes a hard link of a symbolic one.
        os.link(os.path.realpath(path), to)
        return
    # Nothing that is there already is written over, or through.
    to.touch(exist_ok=False)
    shutil.copyfile(path, to)
    to_disk(to)
