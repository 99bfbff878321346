"""A GGUF's tokenizer as the files that were once built from it, which takes transformers seconds.

An entry is one file, ``$XDG_CACHE_HOME/pyparallel/tokenizers/<key>.json`` (``~/.cache`` by default),
that only its owner can read or write. Its key is a hash of the GGUF's header, which holds the tokenizer,
and of the versions that built it, so another model or library never meets it. One that is broken, or
that somebody else could have written, counts as none, and is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyparallel.checkpoint.gguf_parts import read_parts
from pyparallel.checkpoint.tokenizer import MAX_BYTES

# The oldest of more are removed.
MAX_ENTRIES = 16
_ENTRY = re.compile(r"[0-9a-f]{64}\.json")


def entry_of(path: Path, versions: Sequence[str]) -> Path | None:
    """Where the tokenizer of a GGUF file is kept; None where there is no place for caches.

    Raises:
        CheckpointError: the file is no whole GGUF.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        try:
            root = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    (file, header), *_ = read_parts(path)
    size = min((tensor.offset for tensor in header.tensors), default=file.stat().st_size)
    key = hashlib.sha256(json.dumps(list(versions)).encode())
    with open(file, "rb") as held:
        key.update(held.read(size))
    return Path(root, "pyparallel", "tokenizers", f"{key.hexdigest()}.json")


def unpack(entry: Path, folder: Path) -> bool:
    """Write an entry's files into ``folder``; False where there is none that can be trusted."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, encoding="utf-8") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                return False
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                return False
            told = json.load(file)
        files = {str(name): str(text) for name, text in told["files"].items()}
        if told["sum"] != _sum(files) or any("/" in name for name in files):
            return False
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return True
    return False


def keep(entry: Path, folder: Path) -> None:
    """Keep the files of ``folder`` as ``entry``; where the place can't be written, nothing is kept."""
    with contextlib.suppress(OSError, ValueError):
        files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made for its owner alone, and seen under its name only when it is whole.
        descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".part", dir=entry.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"sum": _sum(files), "files": files}, file)
            os.replace(partial, entry)
        except BaseException:
            os.unlink(partial)
            raise
        _remove_oldest(entry.parent)


def _sum(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _remove_oldest(folder: Path) -> None:
    entries = [file for file in folder.iterdir() if _ENTRY.fullmatch(file.name)]
    entries.sort(key=lambda file: file.lstat().st_mtime)
    for file in entries[: max(0, len(entries) - MAX_ENTRIES)]:
        file.unlink(missing_ok=True)
