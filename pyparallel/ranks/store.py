"""torch's store for the ranks of one launch, over socket pairs that only they inherit.

torch's own store for several processes listens on a port of every interface and knows no secret. Here
there is no address at all: the launcher keeps the table, and a rank has the other end of one socket.
What is said is a JSON header and the value's bytes; nothing is unpickled.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

# A rank waits in slices, so that its other threads get their turn on the one socket.
SLICE_S = 0.05
# How long an answer of the launcher may take that has nothing to wait for.
ANSWER_S = 60.0


class StoreServer:
    """The launcher's table, and a thread for each rank's socket."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._ends: list[Connection] = []

    def channel(self) -> socket.socket:
        """A new rank's end; the caller hands it over and closes its own copy."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        end = Connection(ours.detach())
        self._ends.append(end)
        thread = threading.Thread(
            target=self._serve, args=(end,), name="pyparallel-store", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            theirs.close()
            raise
        return theirs

    def _serve(self, end: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                header, _, value = end.recv_bytes().partition(b"\0")
                asked = json.loads(header)
                done, answer = self._do(asked["do"], asked["keys"], asked["number"], value)
                end.send_bytes(bytes([done]) + answer)
        end.close()

    def _do(self, do: str, keys: list[str], number: float, value: bytes) -> tuple[bool, bytes]:
        with self._changed:
            if do == "set":
                self._data[keys[0]] = value
            elif do == "append":
                self._data[keys[0]] = self._data.get(keys[0], b"") + value
            elif do == "add":
                value = str(int(self._data.get(keys[0], b"0")) + int(number)).encode()
                self._data[keys[0]] = value
            elif do == "compare":
                expected, desired = value[: int(number)], value[int(number) :]
                found = self._data.get(keys[0])
                if found == expected or (found is None and not expected):
                    self._data[keys[0]] = desired
                value = self._data.get(keys[0], expected)
            elif do == "delete":
                return self._data.pop(keys[0], None) is not None, b""
            elif do == "count":
                return True, str(len(self._data)).encode()
            else:
                there = self._changed.wait_for(lambda: all(k in self._data for k in keys), number)
                if not there or do not in ("get", "all"):
                    return there, b""
                values = [self._data[key] for key in keys]
                lengths = (
                    json.dumps(list(map(len, values))).encode() + b"\0" if do == "all" else b""
                )
                return True, lengths + b"".join(values)
            self._changed.notify_all()
            return True, value

    def close(self) -> None:
        """Hang up; a thread that is reading ends when its rank does."""
        for end in self._ends:
            with suppress(OSError):
                socket_of = socket.socket(fileno=end.fileno())
                try:
                    socket_of.shutdown(socket.SHUT_RDWR)
                finally:
                    socket_of.detach()


class InheritedStore(dist.Store):
    """A rank's end of the launcher's table, as torch.distributed asks for it."""

    def __init__(self, descriptor: int, timeout: timedelta) -> None:
        super().__init__()
        self.set_timeout(timeout)
        self._end = Connection(descriptor)
        self._lock = threading.Lock()

    def _ask(self, do: str, keys: Sequence[str], number: float = 0, value: bytes = b"") -> Any:
        header = json.dumps({"do": do, "keys": list(keys), "number": number}).encode()
        with self._lock:
            try:
                self._end.send_bytes(header + b"\0" + value)
                if not self._end.poll(ANSWER_S):
                    raise dist.DistStoreError(f"the launcher's store did not answer {do} {keys}")
                answer = self._end.recv_bytes()
            except (EOFError, OSError) as error:
                raise dist.DistStoreError(f"the launcher's store is gone ({error})") from error
        return bool(answer[0]), answer[1:]

    def _await(self, do: str, keys: Sequence[str], timeout: timedelta | None) -> bytes:
        seconds = (self.timeout if timeout is None else timeout).total_seconds()
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            there, value = self._ask(do, keys, max(0.0, min(SLICE_S, left)))
            if there:
                return value
            if left <= 0:
                raise dist.DistStoreError(f"wait timeout after {seconds:g} s, keys: {list(keys)}")

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", [key], value=_bytes(value))

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", [key], value=_bytes(value))

    def get(self, key: str) -> bytes:
        return self._await("get", [key], None)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", [key], amount)[1])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        first = _bytes(expected)
        return self._ask("compare", [key], len(first), first + _bytes(desired))[1]

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask("check", keys)[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._await("wait", keys, timeout)

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", [key])[0]

    def num_keys(self) -> int:
        return int(self._ask("count", [])[1])

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        header, _, values = self._await("all", keys, None).partition(b"\0")
        lengths = json.loads(header)
        ends = itertools.accumulate(lengths)
        return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        return True

    # torch's C++ asks by these names.
    deleteKey: Callable[..., bool] = delete_key
    getNumKeys: Callable[..., int] = num_keys


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
