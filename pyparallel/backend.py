"""THE op x backend table: which implementation of an op runs on which tensors.

Implementations register themselves; callers ask :func:`select` and nothing else asks where a tensor
lives. The automatic choice is the first backend of ``ORDER`` that supports the call. An explicit one
(``PYPARALLEL_BACKEND``, or ``with use("triton")``) runs, or raises with the reason.

Backends: ``cuda`` (the CUDA extension), ``triton`` (pyparallel.kernels; on CPU tensors in Triton's
interpreter, only where asked for), ``cpu`` (the C++ extension), ``torch`` (the library's kernels),
``reference`` (fp32 truth; only where asked for).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

ORDER = ("cuda", "triton", "cpu", "torch")
BACKENDS = (*ORDER, "reference")


@dataclass(frozen=True)
class Implementation:
    """One op on one backend. ``supports(*args)`` is None, or why a call can't run there."""

    op: str
    backend: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]


class UnsupportedError(ValueError):
    """No backend, or not the chosen one, can run a call; the message has the reasons."""


_table: dict[str, dict[str, Implementation]] = {}
_chosen: list[str] = []


def _always(*args: Any, **kwargs: Any) -> None:
    return None


def register(
    op: str, backend: str, *, supports: Callable[..., str | None] = _always
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function into the table as ``op`` on ``backend``."""
    _check(backend)

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        _table.setdefault(op, {})[backend] = Implementation(op, backend, run, supports)
        return run

    return enter


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
    if op not in _table:
        raise ValueError(f"op: expected one of {', '.join(sorted(_table))}, got {op!r}")
    rows = _table[op]
    explicit = chosen()
    reasons = []
    for backend in (explicit,) if explicit else ORDER:
        row = rows.get(backend)
        reason = "not implemented" if row is None else row.supports(*args, **kwargs)
        if reason is None:
            return row.run
        reasons.append(f"{backend}: {reason}")
    raise UnsupportedError(f"{op}: no backend can run this call ({'; '.join(reasons)})")


def offered(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """The implementation of a fused ``op`` that runs on these arguments, or None: for callers who know
    the unfused way, whose own ops then run on the backend that :func:`select` finds."""
    rows = _table.get(op, {})
    explicit = chosen()
    for backend in (explicit,) if explicit else ORDER:
        row = rows.get(backend)
        if row is not None and row.supports(*args, **kwargs) is None:
            return row.run
    return None


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` on the backend that :func:`select` finds."""
    return select(op, *args, **kwargs)(*args, **kwargs)


def table() -> dict[str, list[str]]:
    """The backends of each op, for ``pyparallel doctor``."""
    return {op: [name for name in BACKENDS if name in rows] for op, rows in sorted(_table.items())}


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
