"""Links for CPU ranks: threads of one process, and processes over a communicator of the project."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.shared.buffer import SharedBuffer


class RaceError(RuntimeError):
    """Two steps touched the same region at the same time, one of them writing."""


class Mailbox:
    """The links of ranks that are threads of one process.

    A receiver copies straight out of the sender's memory, and the sender's step ends when that is
    done: the least synchronisation NCCL's point-to-point kernels give, and the longest time a send
    buffer is in use.
    """

    def __init__(self, size: int, *, timeout: float = 20.0, pull_time: float = 0.0) -> None:
        self.size = size
        self.timeout, self.pull_time = timeout, pull_time
        # Set when a rank has failed, so that the others stop waiting for it.
        self.failed = threading.Event()
        self.letters: dict[tuple[int, int], queue.Queue[tuple[Tensor, threading.Event]]] = {
            (a, b): queue.Queue() for a in range(size) for b in range(size)
        }
        self.shared: dict[tuple[str, int], Tensor] = {}
        self.met = threading.Barrier(size)

    def link(self, rank: int) -> MailboxLink:
        """The link of one rank."""
        return MailboxLink(self, rank)

    def fail(self) -> None:
        """Ends the waits of all ranks, those of a meeting too."""
        self.failed.set()
        self.met.abort()


class MailboxLink:
    """See `actions.CopyLink`."""

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank

    def buffer(self, name: str, shape: Sequence[int], like: Tensor, *, elements: int) -> Tensor:
        return like.new_empty(shape)

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        taken = threading.Event()
        self.mailbox.letters[self.rank, send_to].put((send, taken))
        self._receive(receive, receive_from)
        self._wait(taken, send_to)

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        parts = output.split(list(rows))
        self._swap([own] * self.mailbox.size, parts)

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        self._swap(send.split(list(rows_out)), output.unbind())

    def share(self, name: str, rows: int, columns: int, like: Tensor) -> MailboxShared:
        return MailboxShared(self, name, like.new_empty(rows, columns))

    def meet(self) -> None:
        try:
            self.mailbox.met.wait(self.mailbox.timeout)
        except threading.BrokenBarrierError:
            raise TimeoutError(f"rank {self.rank}: not all ranks came to a meeting") from None

    def _swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        taken = [threading.Event() for _ in sends]
        for peer, tensor in enumerate(sends):
            self.mailbox.letters[self.rank, peer].put((tensor, taken[peer]))
        for peer, tensor in enumerate(receives):
            self._receive(tensor, peer)
        for peer, event in enumerate(taken):
            self._wait(event, peer)

    def _receive(self, tensor: Tensor, peer: int) -> None:
        letters = self.mailbox.letters[peer, self.rank]
        deadline = time.monotonic() + self.mailbox.timeout
        while True:
            try:
                data, taken = letters.get(timeout=0.02)
                break
            except queue.Empty:
                self._check(deadline, f"nothing came from rank {peer}")
        tensor.copy_(data)
        taken.set()

    def _wait(self, event: threading.Event, peer: int) -> None:
        deadline = time.monotonic() + self.mailbox.timeout
        while not event.wait(0.02):
            self._check(deadline, f"rank {peer} took nothing")

    def _check(self, deadline: float, what: str) -> None:
        if self.mailbox.failed.is_set() or time.monotonic() > deadline:
            raise TimeoutError(f"rank {self.rank}: {what} in {self.mailbox.timeout} s")


class MailboxShared:
    """See `actions.Shared`."""

    def __init__(self, link: MailboxLink, name: str, own: Tensor) -> None:
        self.link, self.name = link, name
        self.own = link.mailbox.shared[name, link.rank] = own

    def pull(self, peer: int, begin: int, out: Tensor) -> None:
        mailbox = self.link.mailbox
        source = mailbox.shared[self.name, peer][begin : begin + out.shape[0]]
        before = source.clone()
        out.copy_(source)
        # Long enough for an owner that does not wait to be seen writing.
        time.sleep(mailbox.pull_time * random.random())
        if not same_bits(source, before):
            raise RaceError(
                f"rank {self.link.rank}: {self.name} of rank {peer} changed while it was copied"
            )


class CommunicatorLink:
    """A CopyLink over the shared-memory engine; without copies, over any Communicator of the project.

    An exchange is an all-to-all with one message out and one in: every rank is in the same round,
    so no order of sends can deadlock, whatever the communicator buffers.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.buffers: dict[str, SharedBuffer] = {}

    def buffer(self, name: str, shape: Sequence[int], like: Tensor, *, elements: int) -> Tensor:
        return like.new_empty(shape)

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        out, into = [0] * self.communicator.size, [0] * self.communicator.size
        out[send_to], into[receive_from] = send.numel(), receive.numel()
        self.communicator.all_to_all(
            receive.view(-1), send.view(-1), output_counts=into, input_counts=out
        )

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        counts = [count * own.shape[1] for count in rows]
        self.communicator.all_gather(output.view(-1), own.view(-1), counts=counts)

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        out = [count * send.shape[1] for count in rows_out]
        into = [output[0].numel()] * self.communicator.size
        self.communicator.all_to_all(
            output.view(-1), send.view(-1), output_counts=into, input_counts=out
        )

    def share(self, name: str, rows: int, columns: int, like: Tensor) -> EngineShared:
        num_bytes = max(rows * columns * like.itemsize, 1)
        if name not in self.buffers or self.buffers[name].num_bytes < num_bytes:
            c = self.communicator
            self.buffers[name] = SharedBuffer(c.engine, c.rank, c.size, num_bytes)
        return EngineShared(self.buffers[name], self.communicator.rank, (rows, columns), like.dtype)

    def meet(self) -> None:
        self.communicator.barrier()


class EngineShared:
    """See `actions.Shared`."""

    def __init__(
        self, buffer: SharedBuffer, rank: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.buffer, self.columns = buffer, shape[1]
        self.own = buffer.of(rank, 0, shape, dtype)

    def pull(self, peer: int, begin: int, out: Tensor) -> None:
        out.copy_(self.buffer.of(peer, begin * self.columns, out.shape, out.dtype))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bytes, NaN or not."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
