"""What a rank came to, and how its launcher hears of it through a pipe that only the two have."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from pyparallel.comm.communicator import PeerError

# Seconds between the request to end and the kill.
GRACE_S = 2.0


class RankError(RuntimeError):
    """A rank failed. ``rank`` says which, ``__cause__`` is its exception (if it lived to raise one)."""

    def __init__(self, rank: int, world_size: int, reason: str, remote_traceback: str = "") -> None:
        self.rank = rank
        self.world_size = world_size
        self.reason = reason
        self.remote_traceback = remote_traceback
        super().__init__(
            f"rank {rank} of {world_size}: {reason}"
            + (f"\n\n{remote_traceback}" if remote_traceback else "")
        )


@dataclass
class Outcome:
    """What one rank came to."""

    value: Any = None
    error: BaseException | None = None
    reason: str | None = None
    trace: str = ""

    def gravity(self) -> int:
        """Causes before consequences: a death, then an error of its own, then the loss of a peer."""
        if self.error is None:
            return 0
        return 2 if isinstance(self.error, PeerError) else 1


@dataclass
class Report:
    """What a rank tells on its way."""

    value: Any


class Process(Protocol):
    """What is asked of a rank's process here."""

    @property
    def exitcode(self) -> int | None: ...

    def join(self, timeout: float | None = None) -> None: ...


class Inbox:
    """A rank's end of the pipe, read as bytes come: a rank stopped in mid-message holds nobody up."""

    def __init__(self, receiver: Connection) -> None:
        self.receiver = receiver
        self._bytes = bytearray()
        os.set_blocking(receiver.fileno(), False)

    def take(self) -> bytes | None:
        """A whole message, or None while there is none.

        Raises:
            EOFError: nobody will write any more, or the pipe is broken.
        """
        while True:
            start, size = 4, struct.unpack_from("!i", self._bytes)[0] if self.holds(4) else None
            if size == -1:
                start, size = (
                    12,
                    struct.unpack_from("!Q", self._bytes, 4)[0] if self.holds(12) else None,
                )
            if size is not None and self.holds(start + size):
                message = bytes(memoryview(self._bytes)[start : start + size])
                del self._bytes[: start + size]
                return message
            try:
                more = os.read(self.receiver.fileno(), 1 << 20)
            except BlockingIOError:
                return None
            except OSError as error:
                raise EOFError from error
            if not more:
                raise EOFError
            self._bytes += more

    def holds(self, count: int) -> bool:
        return len(self._bytes) >= count


def message_of(process: Process, inbox: Inbox, *, gone: bool = False) -> Outcome | Report | None:
    """A rank's next message, None while there is none; the pipe's end means that the rank died.

    Args:
        gone: the process is known to have ended; what it forked may still hold the pipe.
    """
    try:
        message = inbox.take()
        if message is None:
            if not gone:
                return None
            raise EOFError
    except EOFError:
        process.join(GRACE_S)
        code = process.exitcode
        if code is None:
            return Outcome(
                reason="ended with the process that ranks are forked from, which was killed"
            )
        if code < 0:
            return Outcome(reason=f"killed by {signal.Signals(-code).name}")
        return Outcome(reason=f"ended with exit status {code} before it returned")
    try:
        return pickle.loads(message)
    except Exception as error:
        return Outcome(
            reason=f"its result can't be unpickled here: {type(error).__name__}: {error}"
        )


def success(value: Any, pickler: Any = pickle) -> bytes:
    try:
        return pickler.dumps(Outcome(value=value))
    except Exception as error:
        raise TypeError(
            f"the result of fn must be picklable, got {type(value).__name__}: {error}"
        ) from error


def failure(error: BaseException, pickler: Any = pickle) -> bytes:
    reason = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    try:
        message = pickler.dumps(Outcome(error=error, reason=reason, trace=trace))
        pickle.loads(message)
        return message
    except Exception:
        # An exception that does not survive pickling is still told by its text.
        return pickle.dumps(Outcome(reason=reason, trace=trace))
