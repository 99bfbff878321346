"""Asynchronous calls of a communicator, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pyparallel.comm.communicator import Work


class CallOrder:
    """One thread that makes the asynchronous calls; calls that wait go after those under way.

    All ranks must make the same calls in the same order, so no call may overtake another.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future | None = None
        # Whether nothing has been asked for since the last drain; read before every small call, so
        # it is no property, which would cost a tenth of one.
        self.idle = True

    def run(self, async_op: bool, call: Callable[..., None], *arguments: Any) -> Work | None:
        """Make the call here, or on the thread; ``arguments`` live until it is made."""
        if not async_op:
            if not self.idle:
                self.drain()
            call(*arguments)
            return None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, f"pyparallel-{self._name}")
        self._last = self._executor.submit(call, *arguments)
        self.idle = False
        return Work(self._last.result)

    def drain(self) -> None:
        """Wait for the calls under way; their errors are told by their handles."""
        if self._last is not None:
            self._last.exception()
            self._last = None
            self.idle = True

    def close(self) -> None:
        """End the thread, after the calls under way."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
