"""THE op x backend table: which implementation of an op runs on which tensors.

A row is a file, found by its name. Under each of ``ROOTS``

    <op>.py            the op's equations, autograd and public function; ``run_torch`` and
                       ``run_reference``, its rows on torch and in fp32, which take every call
    cuda/<op>.py       its row on that backend: ``run(...)``, and ``reason(...)`` of the same arguments:
    triton/<op>.py     None, or why a call can't run there
    cpu/<op>.py
    cuda/__init__.py   ``reason(x, asked)``, one for all rows of the folder: is the backend here, and the
                       call's first argument on it? ``asked``: it is asked for by name. A row's file is
                       imported when this has been None.

Files whose names begin with an underscore are what rows of a folder share.

The automatic choice is the first backend of ``ORDER`` whose reason is None. An explicit one
(``PYPARALLEL_BACKEND``, or ``with use("triton")``) runs, or raises with the reason. What is selected is
what runs: no row chooses again. A fused op has rows only where a kernel does it as one; elsewhere its
caller composes it of other ops, and asks for each of these, see :func:`compose`.

Backends: ``cuda`` (the CUDA extension), ``triton`` (pyparallel.kernels; on CPU tensors in Triton's
interpreter, only where asked for), ``cpu`` (the C++ extension), ``torch`` (the library's kernels),
``reference`` (fp32 truth; only where asked for).
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

ORDER = ("cuda", "triton", "cpu", "torch")
BACKENDS = (*ORDER, "reference")
# These have a folder of rows; the others stand in the op's own file.
FOLDERS = ORDER[:-1]
ROOTS = ("pyparallel.ops", "pyparallel.decoding")


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compiler.assume_constant_result`` does to a function: that imports the compiler,
    and Triton with it, for this one mark.
    """
    function._dynamo_marked_constant = True
    return function


class UnsupportedError(ValueError):
    """No backend, or not the chosen one, can run a call; the message has the reasons."""


class Row:
    """One op on one backend.

    Attributes:
        folder: the ``reason`` of the backend's folder, or None for a row in the op's own file.
        file: the module, or None as long as the folder has refused all calls.
        name: of what runs, in the file.
    """

    def __init__(self, op: str, backend: str, root: str) -> None:
        self.op = op
        self.backend = backend
        self.folder: Callable[[Any, bool], str | None] | None = None
        self.file: Any = None
        self.name = "run"
        if backend in FOLDERS:
            self._module = f"{root}.{backend}.{op}"
            self.folder = import_module(f"{root}.{backend}").reason
        else:
            self._module = f"{root}.{op}"
            self.name = f"run_{backend}"
            self.read()

    def read(self) -> None:
        """Import the file; one that can't be is one whose ``reason`` says so."""
        try:
            self.file = import_module(self._module)
        except ImportError as error:
            text = f"{self._module} can't be imported ({error})"
            self.file = SimpleNamespace(reason=lambda *_, **__: text)

    def reason(self, *args: Any, **kwargs: Any) -> str | None:
        """None, or why a call can't run here."""
        if self.folder is None:
            return None
        if (refused := self.folder(args[0], chosen() == self.backend)) is not None:
            return refused
        _read(self.op, self.backend)
        return self.file.reason(*args, **kwargs)


# By the explicit choice, or under "automatic", and by op: the rows to ask, in order. Attributes, because
# a graph that is being traced sees those that are found meanwhile.
_rows = SimpleNamespace(**{name: SimpleNamespace() for name in ("automatic", *BACKENDS)})
_chosen: list[str] = []


def chosen() -> str | None:
    """The explicitly chosen backend, if there is one."""
    if _chosen:
        return _chosen[-1]
    name = os.environ.get("PYPARALLEL_BACKEND")
    if name:
        _check(name)
    return name or None


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the block on ``backend``, or raise :class:`UnsupportedError`."""
    _check(backend)
    _chosen.append(backend)
    try:
        yield
    finally:
        _chosen.pop()


def select(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The implementation of ``op`` that runs on these arguments."""
    run = _run_of(op, args, kwargs)
    if run is None:
        raise UnsupportedError(f"{op}: no backend can run this call ({_reasons(op, args, kwargs)})")
    return run


def offered(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """The implementation of ``op`` that runs on these arguments, or None: for callers of a fused op who
    know the unfused way, whose own ops then run on the backend that :func:`select` finds."""
    return _run_of(op, args, kwargs)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` on the backend that :func:`select` finds."""
    return select(op, *args, **kwargs)(*args, **kwargs)


def compose(op: str, parts: Callable[..., Any], *args: Any) -> Any:
    """Run the fused ``op`` where a row takes the call, else ``parts``: a function of the same arguments
    that does it by other ops, each of which is asked from the table. Where one of these can't run
    either, the error has the fused op's reasons too."""
    run = _run_of(op, args, {})
    if run is not None:
        return run(*args)
    try:
        return parts(*args)
    except UnsupportedError as error:
        reasons = _reasons(op, args, {})
        raise UnsupportedError(
            f"{op}: not as one ({reasons}), nor by its parts: {error}"
        ) from error


def row(op: str, backend: str) -> Row | None:
    """The row of ``op`` on ``backend``, if there is one."""
    _check(backend)
    return _row(op, backend)


def table() -> dict[str, list[str]]:
    """The backends of each op by the files that there are, for ``pyparallel doctor``."""
    found: dict[str, set[str]] = {}
    for root in ROOTS:
        package = import_module(root)
        for op in _names(package):
            own = import_module(f"{root}.{op}")
            backends = {name for name in ("torch", "reference") if hasattr(own, f"run_{name}")}
            if backends:
                found.setdefault(op, set()).update(backends)
        for backend in FOLDERS:
            for op in _names(import_module(f"{root}.{backend}")):
                found.setdefault(op, set()).add(backend)
    return {op: [name for name in BACKENDS if name in found[op]] for op in sorted(found)}


def _names(package: ModuleType) -> list[str]:
    """The files of a folder that may be an op's."""
    found = pkgutil.iter_modules(package.__path__)
    return [m.name for m in found if not m.ispkg and not m.name.startswith("_")]


def _run_of(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """What runs a call: asked for every call of every layer, so :meth:`Row.reason` is spelled out."""
    explicit = chosen()
    for row in _candidates(op, explicit):
        if row.folder is not None:
            if row.folder(args[0], explicit is not None) is not None:
                continue
            _read(op, row.backend)
            if row.file.reason(*args, **kwargs) is not None:
                continue
        return getattr(row.file, row.name)
    return None


def _candidates(op: str, explicit: str | None) -> tuple[Row, ...]:
    """The rows of an op that may be taken, in the order in which they are asked."""
    _find(op, explicit)
    return getattr(getattr(_rows, explicit or "automatic"), op)


# What these two do is done once, and no part of a graph.
@constant_in_graphs
def _find(op: str, explicit: str | None) -> bool:
    known = getattr(_rows, explicit or "automatic").__dict__
    if op not in known:
        names = (explicit,) if explicit else ORDER
        known[op] = tuple(row for name in names if (row := _row(op, name)) is not None)
        if not known[op] and not any(_row(op, name) for name in BACKENDS):
            del known[op]
            raise ValueError(f"op: expected one of {', '.join(table())}, got {op!r}")
    return True


@constant_in_graphs
def _read(op: str, backend: str) -> bool:
    row = _row(op, backend)
    if row.file is None:
        row.read()
    return True


@cache
def _row(op: str, backend: str) -> Row | None:
    """The row, if there is a file for it."""
    for root in ROOTS:
        folder = f"{root}.{backend}" if backend in FOLDERS else root
        if not op.startswith("_") and find_spec(f"{folder}.{op}") is not None:
            row = Row(op, backend, root)
            if row.folder is not None or hasattr(row.file, row.name):
                return row
    return None


def _reasons(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why each backend that may be asked does not run a call."""
    explicit = chosen()
    asked = {row.backend: row.reason(*args, **kwargs) for row in _candidates(op, explicit)}
    names = (explicit,) if explicit else ORDER
    return "; ".join(f"{name}: {asked.get(name, 'not implemented')}" for name in names)


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
