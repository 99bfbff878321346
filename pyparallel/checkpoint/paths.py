"""Paths and names on disk: resolved once, renamed in one step, synced, and named in every error.

Sources: rename(2) and renameat2(2); postgres' durable_rename for the order of syncs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pyparallel.checkpoint.format import CheckpointError

NOREPLACE, EXCHANGE = 1, 2
_AT_FDCWD = -100


def is_plain(name: object) -> bool:
    """Whether a name that was read somewhere is that of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def resolve(folder: str | Path) -> Path:
    """``folder`` without links and dots on the way to it; its last part may be a link.

    Raises:
        CheckpointError: no name, or one of ours for what is unfinished.
    """
    if not str(folder):
        raise CheckpointError("folder: expected the name of a folder, got ''")
    given = Path(folder)
    with naming(given):
        if given.name in ("", ".."):
            return Path(os.path.realpath(given))
        return Path(os.path.realpath(given.parent)) / given.name


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system becomes one line with the path in it."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise CheckpointError(f"{where}: {(error.strerror or str(error)).lower()}") from error


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path, flags: int) -> None:
    """renameat2 of Linux; where it is missing and nothing is to be exchanged, rename."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)
    if call is None:
        failure = errno.ENOSYS
    elif call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return
    else:
        failure = ctypes.get_errno()
    if flags == NOREPLACE and failure in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        old.rename(new)
        return
    raise OSError(failure, os.strerror(failure), str(new))
