"""What a command asks its ranks while they run: a pipe to each, without a file, an address or a timeout.

A rank opens the launcher's end by the launcher's process number (``/proc``), which the kernel allows the
same user alone. It waits there for as long as nobody asks; the end of the pipe is the end of the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
from typing import Any


class Questions:
    """The launcher's side. Close it, and the ranks return.

    Attributes:
        places: for each rank what :class:`Hearing` takes.
    """

    def __init__(self, world_size: int) -> None:
        self._readers: list[int] = []
        self._writers: list[int] = []
        for _ in range(world_size):
            reader, writer = os.pipe()
            self._readers.append(reader)
            self._writers.append(writer)
        self.places = [(os.getpid(), reader) for reader in self._readers]
        self._turn = 0

    def all_hear(self) -> None:
        """Every rank has opened its end: from now on one that died is noticed at the next question."""
        while self._readers:
            os.close(self._readers.pop())

    def ask(self, value: dict[str, Any]) -> None:
        """Send ``value``, of JSON, to all ranks."""
        self._turn += 1
        for writer in self._writers:
            # The end of a rank is told by launch().
            with contextlib.suppress(BrokenPipeError):
                _write(writer, {**value, "turn": self._turn})

    def stop(self) -> None:
        """Ask rank 0 to leave the rest of the last answer."""
        with contextlib.suppress(BrokenPipeError, IndexError):
            _write(self._writers[0], {"stop": self._turn})

    def close(self) -> None:
        """Nothing more is asked."""
        self.all_hear()
        while self._writers:
            os.close(self._writers.pop())


class Hearing:
    """A rank's side."""

    def __init__(self, launcher: int, descriptor: int) -> None:
        self._pipe = os.open(f"/proc/{launcher}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        self._rest = b""
        self._turn = 0

    def next(self) -> dict[str, Any] | None:
        """The next question, however long it takes to come; None at the end."""
        while (message := self._message()) is not None:
            # The wish to stop an answer that had just ended.
            if "stop" not in message:
                self._turn = message["turn"]
                break
        return message

    def stopped(self) -> bool:
        """Whether the rest of the answer to the last question is not wanted; without waiting."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while b"\n" in self._rest or poll.poll(0):
            message = self._message()
            # A closed pipe is the end of the command; an earlier answer's wish has been granted.
            if message is None or message["stop"] == self._turn:
                return True
        return False

    def _message(self) -> dict[str, Any] | None:
        while b"\n" not in self._rest:
            data = os.read(self._pipe, 1 << 16)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def _write(descriptor: int, value: dict[str, Any]) -> None:
    data = memoryview(json.dumps(value).encode() + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]
