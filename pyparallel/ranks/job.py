"""What a launcher hands to its ranks: the function, by name or by value, and the program it is of.

By name, as ``pickle`` does: a rank imports the module, the program's own script among them. What was
defined in a notebook, at the prompt, by ``python -c`` or on standard input is in no file, so it goes by
value, and so do results of its classes: cloudpickle, through the same inherited memory and pipes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from multiprocessing import process
from typing import Any

# In a rank: the program that it is importing.
_imported: str | None = None


class MissingGuardError(ValueError):
    """A script launches ranks while a rank imports it: nothing keeps it from doing so."""


def pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The bytes of what a rank calls.

    Raises:
        ValueError: something can't be pickled; or it is in no file, and cloudpickle is not installed.
    """
    try:
        job = pickler(by_value()).dumps((fn, args))
    except Exception as error:
        raise ValueError(
            f"launch: fn and its arguments must be picklable, got {type(error).__name__}: {error}; "
            f"define fn at the top level of a module"
        ) from error
    if not has_file() and not by_value() and b"__main__" in job:
        raise ValueError(
            "launch: expected fn and its arguments from a module that ranks can import, got some that "
            "were defined in a notebook, at the prompt or by -c; put them into a file, or "
            "`pip install cloudpickle`"
        )
    return job


def by_value() -> bool:
    """Whether this program's own functions and classes go to its ranks by value."""
    if has_file():
        return False
    try:
        import cloudpickle  # noqa: F401
    except ImportError:
        return False
    return True


def pickler(by_value: bool) -> Any:
    """The module whose ``dumps`` is used; ``pickle.loads`` reads both."""
    if not by_value:
        return pickle
    import cloudpickle

    return cloudpickle


def has_file() -> bool:
    """Whether a rank can import this program: a file or a module, with nothing typed since."""
    main = sys.modules["__main__"]
    if sys.flags.interactive or hasattr(sys, "ps1"):
        return False
    if getattr(getattr(main, "__spec__", None), "name", None) is not None:
        return True
    path = getattr(main, "__file__", None)
    return path is not None and os.path.isfile(_absolute(path))


def preparation() -> dict[str, Any]:
    """How a rank finds this program's modules, its main one among them, as multiprocessing does."""
    folder = process.ORIGINAL_DIR
    told: dict[str, Any] = {
        "sys_path": [folder if entry == "" else entry for entry in sys.path if entry or folder],
        "sys_argv": sys.argv,
    }
    if has_file():
        main = sys.modules["__main__"]
        name = getattr(getattr(main, "__spec__", None), "name", None)
        if name is not None:
            told["init_main_from_name"] = name
        else:
            told["init_main_from_path"] = _absolute(main.__file__)
    return told


def check_not_importing() -> None:
    """Raise in a rank that is importing the program, and so runs what only its launcher should."""
    if _imported is not None:
        raise MissingGuardError(
            f"launch: called while a rank imports {_imported}, which launches ranks in turn; put the "
            f'call, and all that only the launcher does, under `if __name__ == "__main__":`'
        )


@contextlib.contextmanager
def importing(program: dict[str, Any]) -> Iterator[None]:
    """In a rank, while it imports the launcher's program."""
    global _imported
    path = program.get("init_main_from_path")
    _imported = program.get("init_main_from_name") if path is None else os.path.basename(path)
    try:
        yield
    finally:
        _imported = None


def _absolute(path: str) -> str:
    return os.path.normpath(os.path.join(process.ORIGINAL_DIR or "", path))
