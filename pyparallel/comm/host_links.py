"""The connections of a heartbeat: made, proven and heard without waiting for any one of them.

Anybody who reaches the port may connect. A connection counts when it has said the token, which the job's
ranks told each other; what has not within five seconds, or says anything else, is hung up on. Meanwhile
the others are heard, and at most 64 that have proven nothing are held open.
"""

from __future__ import annotations

import errno
import hmac
import os
import select
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pyparallel.comm.job_hosts import TOKEN_BYTES, Host

# Without an answer for so long a host is lost; it is asked every second.
LOST_AFTER_S = 8
CONNECT_S = 5.0
# The other end says the token as soon as its thread gets the interpreter's lock.
PROVE_S = 5.0
# A host's place among the hosts, as it is told.
INDEX_BYTES = 4
MAX_UNPROVEN = 64
# Where this process has no descriptor left for who connects.
ACCEPT_AGAIN_S = 0.1
# Of a connection whose other end has gone in an orderly way, or at once: a process ended, not its host.
ENDED = (errno.ECONNRESET, errno.EPIPE)


@dataclass
class Link:
    """A connection with another rank's heartbeat.

    Attributes:
        end: never blocks.
        host: the other end's where that is another one.
        deadline: of ``time.monotonic()``, for what has not connected or proven itself; then None.
        to: the host that is being connected to.
        heard: the beginning of a message.
    """

    end: socket.socket
    host: int | None
    deadline: float | None
    to: Host | None = None
    heard: bytes = b""

    @property
    def unproven(self) -> bool:
        return self.deadline is not None and self.to is None


class Links:
    """The links of one rank, served by one thread."""

    def __init__(self, hosts: Sequence[Host], own: int, listener: socket.socket | None) -> None:
        self._hosts, self._own, self._listener = hosts, own, listener
        self._links: dict[int, Link] = {}
        self._poll = select.poll()
        self._end = os.eventfd(0)
        self._ending = False
        self._poll.register(self._end, select.POLLIN)
        if listener is not None:
            listener.setblocking(False)
            self._poll.register(listener, select.POLLIN)

    def connect(self, host: int) -> None:
        """Begin to connect to a host's first rank."""
        to = self._hosts[host]
        if not to.port:
            _warn_unwatched(to, "it has no address that another host could reach")
            return
        end = socket.socket(socket.AF_INET6 if ":" in to.addresses[0] else socket.AF_INET)
        end.setblocking(False)
        try:
            with suppress(BlockingIOError):
                end.connect((to.addresses[0], to.port))
        except OSError as error:
            end.close()
            _warn_unwatched(to, str(error))
            return
        watched = None if host == self._own else host
        self._add(Link(end, watched, time.monotonic() + CONNECT_S, to), select.POLLOUT)

    def hear(self) -> list[int]:
        """Wait until there is something to do, and do it.

        Returns:
            hosts that are lost, by the kernel or by what others say.
        """
        if self._listener is not None:
            room = sum(link.unproven for link in self._links.values()) < MAX_UNPROVEN
            self._poll.modify(self._listener, select.POLLIN if room else 0)
        lost = []
        for descriptor, _ in self._poll.poll(self._patience_ms()):
            if self._listener is not None and descriptor == self._listener.fileno():
                self._accept(self._listener)
            elif descriptor == self._end:
                self._ending = True
            elif descriptor in self._links:
                lost.append(self._serve(self._links[descriptor]))
        for link in list(self._links.values()):
            if link.deadline is not None and link.deadline <= time.monotonic():
                self._forget(link)
                if link.to is not None:
                    _warn_unwatched(link.to, f"no answer for {CONNECT_S:.0f} s")
        return [host for host in lost if host is not None]

    def tell(self, lost: int) -> None:
        """Tell everybody of a lost host."""
        for link in self._links.values():
            if link.deadline is None:
                with suppress(OSError):
                    link.end.send(lost.to_bytes(INDEX_BYTES, "big"))

    @property
    def ended(self) -> bool:
        """Whether nobody is left to hear of, or nobody wants to."""
        return self._ending or (not self._links and self._listener is None)

    def end(self) -> None:
        """Have :meth:`hear` return, from another thread; ``ended`` is true then."""
        os.eventfd_write(self._end, 1)

    def close(self) -> None:
        """Close the listener and all connections, once their thread has ended."""
        for link in list(self._links.values()):
            self._forget(link)
        if self._listener is not None:
            self._listener.close()
        os.close(self._end)

    def inodes(self) -> set[int]:
        """The kernel's numbers of the connections."""
        return {os.fstat(descriptor).st_ino for descriptor in self._links}

    def _patience_ms(self) -> float | None:
        deadlines = [link.deadline for link in self._links.values() if link.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None

    def _add(self, link: Link, events: int) -> None:
        self._links[link.end.fileno()] = link
        self._poll.register(link.end, events)

    def _forget(self, link: Link) -> None:
        self._poll.unregister(link.end)
        del self._links[link.end.fileno()]
        link.end.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            end, _ = listener.accept()
        except OSError:
            time.sleep(ACCEPT_AGAIN_S)
            return
        end.setblocking(False)
        self._add(Link(end, None, time.monotonic() + PROVE_S), select.POLLIN)

    def _serve(self, link: Link) -> int | None:
        """A host that is lost, by this link; None for anything else."""
        connecting = link.to is not None and link.deadline is not None
        wanted = TOKEN_BYTES + INDEX_BYTES if link.unproven else INDEX_BYTES
        try:
            if connecting:
                self._greet(link)
                return None
            said = link.end.recv(wanted - len(link.heard))
        except BlockingIOError:
            return None
        except OSError as error:
            self._forget(link)
            if connecting:
                _warn_unwatched(link.to, str(error))
                return None
            return None if link.unproven or error.errno in ENDED else link.host
        if not said:
            self._forget(link)
            return None
        link.heard += said
        if len(link.heard) < wanted:
            return None
        message, link.heard = link.heard, b""
        if link.unproven:
            self._prove(link, message)
            return None
        told = int.from_bytes(message, "big")
        return told if told < len(self._hosts) else None

    def _greet(self, link: Link) -> None:
        """Say the token: the connection is there, or the kernel says why not."""
        if failed := link.end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(failed, os.strerror(failed))
        link.end.send(link.to.token + self._own.to_bytes(INDEX_BYTES, "big"))
        link.deadline = None
        self._poll.modify(link.end, select.POLLIN)
        _have_watched(link)

    def _prove(self, link: Link, said: bytes) -> None:
        host = int.from_bytes(said[TOKEN_BYTES:], "big")
        knows = hmac.compare_digest(said[:TOKEN_BYTES], self._hosts[self._own].token)
        if not knows or host >= len(self._hosts):
            self._forget(link)
            return
        link.host, link.deadline = None if host == self._own else host, None
        _have_watched(link)


def _have_watched(link: Link) -> None:
    """Have the kernel ask whether the other host is there."""
    if link.host is not None:
        link.end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        link.end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        link.end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LOST_AFTER_S)
        # Bounds what was sent and not answered, too.
        link.end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000)


def _warn_unwatched(host: Host, why: str) -> None:
    message = (
        f"{host} can't be watched ({why}): its loss is told at the timeout of what waits for it; let "
        f"the job's hosts connect to each other's ports"
    )
    try:
        warnings.warn(message, stacklevel=1)
    except UserWarning:
        # Where warnings are errors, the others are watched all the same.
        print(f"pyparallel: {message}", file=sys.stderr, flush=True)
