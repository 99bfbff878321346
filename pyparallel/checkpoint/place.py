"""Where a folder of ours appears: whole, in one step, and nothing is lost that we did not write.

The rules, for :func:`pyparallel.save` and ``export`` alike:

- The path is resolved once. A link, or anything that is no folder, is refused before the first byte.
- What is written lies beside its place until it is whole, in a folder that nobody else could have named:
  ``.NAME.<16 hexadecimal digits>.writing``, made exclusively and locked while its writer lives.
- A folder that is there is replaced with ``overwrite`` alone, and only where a list of ours,
  :data:`LIST`, says that we wrote it. If everything in it is ours the two folders change places in one
  step (renameat2 of Linux); so at every moment one of them, whole, has the name.
- Where others' files lie in it too, or it is somebody's current folder, only the files that our list
  names are replaced, one by one: new tensors come under new names, the file that makes them valid is
  renamed into its place, and then the old ones go.
- What a dead run left is removed by the next one, if it is ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.paths import EXCHANGE, NOREPLACE, naming, rename, resolve, to_disk
from pyparallel.checkpoint.written import LIST, names_of, own_files, write_list

# A name may have 255 bytes.
_NAME_BYTES = 200


class Place:
    """One folder's place, from before the first byte until it has its name.

    Args:
        folder: what appears.
        overwrite: replace a folder of ours that is there.
        source: what is read meanwhile, and must not be replaced.

    Attributes:
        token: 16 random hexadecimal digits, of this place alone.

    Raises:
        CheckpointError: the place is taken, or not to be replaced.
    """

    def __init__(
        self, folder: str | Path, *, overwrite: bool, source: str | Path | None = None
    ) -> None:
        self.folder = resolve(folder)
        with naming(self.folder):
            self._check(overwrite, source)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _clean(self.folder)
            self.token = secrets.token_hex(8)
            self.working = _beside(self.folder, self.token, "writing")
            self.working.mkdir()
            # Before the list: nobody else asks for the lock of a folder without one.
            self._lock = _locked(self.working, fcntl.LOCK_EX)
            write_list(self.working, [], finished=False)
            # New names where old files go on lying beside the new ones for a moment.
            self.suffix = f"-{self.token}" if self._merges() else ""

    def _check(self, overwrite: bool, source: str | Path | None) -> None:
        folder = self.folder
        if not os.path.lexists(folder):
            return
        if folder.is_symlink():
            raise CheckpointError(
                f"{folder}: is a link; give the folder it leads to, {os.path.realpath(folder)}"
            )
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a folder, or nothing; a file is there")
        if not overwrite:
            raise CheckpointError(
                f"{folder}: is there already; choose another folder, or overwrite=True"
            )
        if source is not None and _same(folder, Path(source)):
            raise CheckpointError(
                f"{folder}: is what is read; it can't be replaced, choose another folder"
            )
        if any(folder.iterdir()) and own_files(folder) is None:
            raise CheckpointError(
                f"{folder}: holds files that pyparallel did not write ({_some(folder)}); "
                f"choose another folder, or empty it"
            )

    def _merges(self) -> bool:
        """Whether what is there has to stay where it is."""
        if not self.folder.is_dir():
            return False
        here = Path(os.path.realpath(os.curdir)) if _has_current() else None
        if here is not None and (here == self.folder or self.folder in here.parents):
            return True
        return not {path.name for path in self.folder.iterdir()} <= (
            own_files(self.folder) or set()
        )

    def appear(self, commit: str) -> None:
        """Give what was written its name.

        Args:
            commit: the file that makes the others valid: the last to come, where they come one by one.
        """
        with naming(self.folder):
            mode = (self.working / LIST).stat().st_mode & 0o777
            names = sorted(path.name for path in self.working.iterdir() if path.name != LIST)
            for name in names:
                # What has another name elsewhere is a link to somebody's file.
                if (self.working / name).stat().st_nlink == 1:
                    os.chmod(self.working / name, mode)
                to_disk(self.working / name)
            write_list(self.working, names, finished=True)
            to_disk(self.working)
            if self._merges():
                self._merge(names, commit)
            elif not os.path.lexists(self.folder):
                rename(self.working, self.folder, NOREPLACE)
            elif not any(self.folder.iterdir()):
                self.working.rename(self.folder)
            else:
                self._exchange()
            to_disk(self.folder.parent)
        self._end()

    def _exchange(self) -> None:
        try:
            rename(self.working, self.folder, EXCHANGE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            # A file system that can't: between these two lines only the next run, or whoever reads
            # the message of load(), finds the old folder.
            old = self.working.with_suffix(".replaced")
            self.folder.rename(old)
            self.working.rename(self.folder)
            self.working = old
        to_disk(self.folder.parent)
        _remove_old(self.working, self.folder)

    def _merge(self, names: Sequence[str], commit: str) -> None:
        ours = own_files(self.folder) or set()
        for name in names:
            if os.path.lexists(self.folder / name) and name not in ours:
                raise CheckpointError(
                    f"{self.folder / name}: is not one that pyparallel wrote; move it away, or choose "
                    f"another folder"
                )
        # From here on both the old and the new are known as ours.
        write_list(self.folder, sorted({*ours, *names} - {LIST}), finished=True)
        to_disk(self.folder)
        last = [name for name in names if _is_described(name)]
        tensors = [name for name in names if name not in last and name != commit]
        for name in (*tensors, commit, *(name for name in last if name != commit)):
            os.replace(self.working / name, self.folder / name)
            if name == commit:
                to_disk(self.folder)
        for name in ours - set(names) - {LIST}:
            if not (self.folder / name).is_dir():
                (self.folder / name).unlink(missing_ok=True)
        write_list(self.folder, names, finished=True)
        to_disk(self.folder)
        shutil.rmtree(self.working)

    def close(self) -> None:
        """Remove what did not appear."""
        if self._lock is not None:
            shutil.rmtree(self.working, ignore_errors=True)
            self._end()

    def _end(self) -> None:
        os.close(self._lock)
        self._lock = None


def left_behind(folder: Path) -> str:
    """What is to be said of a folder that is not there: an interrupted run's part, or ''."""
    folder = resolve(folder)
    # All ranks ask at once: none may take another's question for a writer.
    found = list(_leftovers(folder, fcntl.LOCK_SH)) if folder.parent.is_dir() else []
    for path in found:
        if path.suffix == ".replaced":
            return f"; the one before lies whole in {path.name}: rename it, or save again"
    return "; saving it was interrupted" if found else ""


def _is_described(name: str) -> bool:
    """No tensors and no list of them: configuration and tokenizer."""
    return not name.endswith((".safetensors", ".index.json"))


def _some(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _same(folder: Path, source: Path) -> bool:
    source = source if source.is_dir() else source.parent
    return source.is_dir() and folder.samefile(source)


def _has_current() -> bool:
    try:
        os.stat(os.curdir)
    except OSError:
        return False
    return True


def _stem(folder: Path) -> str:
    return os.fsencode(folder.name)[:_NAME_BYTES].decode(errors="ignore")


def _beside(folder: Path, token: str, kind: str) -> Path:
    return folder.with_name(f".{_stem(folder)}.{token}.{kind}")


def _leftovers(folder: Path, kind: int) -> Iterator[Path]:
    """Folders of ours beside ``folder`` whose writer is dead; asked by a lock of ``kind``."""
    pattern = re.compile(rf"\.{re.escape(_stem(folder))}\.[0-9a-f]{{16}}\.(writing|replaced)")
    for path in folder.parent.iterdir():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            ours = own_files(path) is not None
        except CheckpointError:
            continue
        if ours and (lock := _locked(path, kind)) is not None:
            os.close(lock)
            yield path


def _clean(folder: Path) -> None:
    """Remove what dead runs left; what was moved aside for a folder that never came comes back."""
    for path in list(_leftovers(folder, fcntl.LOCK_EX)):
        if path.suffix == ".replaced" and not os.path.lexists(folder):
            rename(path, folder, NOREPLACE)
        else:
            _remove_old(path, folder)


def _remove_old(path: Path, folder: Path) -> None:
    """Remove a folder of ours; a file that somebody put there meanwhile goes where it belongs."""
    finished, names = names_of(path)
    if not finished:
        shutil.rmtree(path, ignore_errors=True)
        return
    for name in names:
        if (path / name).is_symlink() or not (path / name).is_dir():
            (path / name).unlink(missing_ok=True)
    for other in list(path.iterdir()):
        if other.name != LIST and folder.is_dir() and not os.path.lexists(folder / other.name):
            other.rename(folder / other.name)
    if {other.name for other in path.iterdir()} <= {LIST}:
        (path / LIST).unlink(missing_ok=True)
        path.rmdir()


def _locked(folder: Path, kind: int) -> int | None:
    """A descriptor that holds the folder's lock of that kind; None where another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        # A file system without locks: nothing there is called dead.
        os.close(handle)
        return None
    return handle
