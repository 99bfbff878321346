"""Names for torch.profiler: of collectives, and of ops by the backend that runs them, with their bytes.

While :func:`named` is open the methods of :class:`Communicator`, and the table's choice of what runs an
op, are those of this file; before and after they are their own, and cost what they ever did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from pyparallel import backend
from pyparallel.comm.communicator import Communicator, Work

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send",
    "recv",
    "barrier",
)
# What all ranks of a group are in together: the last one to come says how long the others waited. A send
# may return before anybody has received.
_TOGETHER = frozenset(COLLECTIVES) - {"send", "recv", "broadcast"}
_UNITS = ("B", "KB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Call:
    """One collective of this rank.

    Attributes:
        ranks: of the world, that make the call together; empty where they are not known, or where the
            device makes it later than the host.
        number: of the group's calls, counted from where :func:`named` was opened.
        num_bytes: of the largest tensor.
        start_ns, end_ns: by the system's clock; its end is that of ``wait()``, where somebody waits.
    """

    op: str
    group: str
    ranks: tuple[int, ...]
    number: int
    num_bytes: int
    start_ns: int
    end_ns: int


class _Listener:
    """Whoever has opened :func:`named`: the calls heard, and how many each communicator made."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.counts: dict[int, int] = {}


_listeners: list[_Listener] = []
_own: dict[str, Callable[..., Any]] = {}


@contextmanager
def named() -> Iterator[list[Call]]:
    """Give collectives and ops their names in ``torch.profiler``, in this process.

    For a profiler of your own; :func:`pyparallel.profile` opens it by itself. Graphs of torch.compile
    keep the names that they were traced with.

    Yields:
        the collectives that have ended, in the order of their ends.
    """
    listener = _Listener()
    if not _listeners:
        _install()
    _listeners.append(listener)
    try:
        yield listener.calls
    finally:
        _listeners.remove(listener)
        if not _listeners:
            _uninstall()


def _install() -> None:
    for op in COLLECTIVES:
        _own[op] = getattr(Communicator, op)
        setattr(Communicator, op, _named_collective(op, _own[op]))
    _own["_run_of"] = backend._run_of
    backend._run_of = _named_choice(backend._run_of)


def _uninstall() -> None:
    backend._run_of = _own.pop("_run_of")
    for op in COLLECTIVES:
        setattr(Communicator, op, _own.pop(op))


def _named_collective(op: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def collective(self: Communicator, *args: Any, **options: Any) -> Work | None:
        tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        num_bytes = max((tensor.nbytes for tensor in tensors), default=0)
        text = f"{op} {self.name} {readable(num_bytes)}"
        on_device = any(tensor.is_cuda for tensor in tensors)
        end = _beginning(self, op, num_bytes, known=not on_device)
        with record_function(text):
            work = theirs(self, *args, **options)
        if work is None:
            end()
            return None
        return Work(_named_wait(text, work, end))

    return collective


def _named_wait(text: str, work: Work, end: Callable[[], None]) -> Callable[[], None]:
    def finish() -> None:
        with record_function(f"wait for {text}"):
            work.wait()
        end()

    return finish


def _beginning(self: Communicator, op: str, num_bytes: int, *, known: bool) -> Callable[[], None]:
    """Note a call that begins; what is returned notes its end."""
    ranks: tuple[int, ...] = ()
    if known and op in _TOGETHER and self.process_group is not None:
        ranks = tuple(dist.get_process_group_ranks(self.process_group))
    numbers = []
    for listener in _listeners:
        number = listener.counts.get(id(self), 0)
        listener.counts[id(self)] = number + 1
        numbers.append((listener, number))
    start = time.time_ns()

    def end() -> None:
        now = time.time_ns()
        for listener, number in numbers:
            call = Call(op, self.name, ranks, number, num_bytes, start, now)
            listener.calls.append(call)

    return end


def _named_choice(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def run_of(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        run = theirs(op, args, kwargs)
        if run is None or torch.compiler.is_compiling():
            return run
        folder = run.__module__.split(".")[-2]
        where = folder if folder in backend.FOLDERS else run.__name__.removeprefix("run_")
        num_bytes = sum(value.nbytes for value in args if isinstance(value, Tensor))
        text = f"{op} [{where}] {readable(num_bytes)}"

        named_run = _named(text, run)
        if op == "decode_session":
            return lambda *args, **kwargs: _named_session(named_run(*args, **kwargs))
        return named_run

    return run_of


def _named_session(session: Any) -> Any:
    """A session of decoding, whose steps are calls of its own."""
    kind = type(session).__name__
    for call in ("prefill", "step"):
        setattr(session, call, _named(f"{call} [{kind}]", getattr(session, call)))
    return session


def _named(text: str, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def named_run(*args: Any, **kwargs: Any) -> Any:
        with record_function(text):
            return run(*args, **kwargs)

    return named_run


def readable(num_bytes: int) -> str:
    """Of 4200000: 4.2 MB."""
    value = float(num_bytes)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError
