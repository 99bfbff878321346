"""The communicator over torch.distributed: Gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyparallel.comm.communicator import Communicator, Finish, PeerError
from pyparallel.comm.lost_hosts import lost_among
from pyparallel.comm.peer_watch import bounded_roll_call
from pyparallel.comm.rank_order import rank_ordered_reduce
from pyparallel.cut.shares import part_sizes

T = TypeVar("T")

# The name since torch 2.13, and the one before it.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Up to this many bytes an all-reduce sends whole tensors to everyone (one step); above, each rank
# reduces its part and shares it (two steps, 2/R of the bytes).
ONE_SHOT_BYTES = 256 * 1024


class TorchCommunicator(Communicator):
    """Gloo or NCCL through torch.distributed: the engine that reaches every rank anywhere.

    torch's own reductions sum in an order that depends on the backend, the length and the rank count,
    so only its data movement is used and the sums are done here, in rank order.
    """

    def __init__(self, process_group: dist.ProcessGroup, name: str) -> None:
        self.process_group = process_group
        self.rank = process_group.rank()
        self.size = process_group.size()
        self.name = name
        self._ranks = dist.get_process_group_ranks(process_group)
        self._sent: list[tuple[dist.Work, Tensor, int]] = []
        self._closed = False
        self._sequence = 0
        self._failure: PeerError | None = None

    def _all_reduce(self, tensor: Tensor, op: str) -> Finish:
        if tensor.numel() * tensor.itemsize <= ONE_SHOT_BYTES or self.size == 2:
            copies = tensor.new_empty(self.size, tensor.numel())
            return self._start(
                "all_reduce",
                lambda: self._gather(copies, tensor),
                lambda: rank_ordered_reduce(copies.unbind(), op, tensor),
            )
        counts = part_sizes(tensor.numel(), self.size)
        own = tensor.new_empty(counts[self.rank])
        self._reduce_scatter(own, tensor, counts, op)()
        return self._all_gather(tensor, own, counts)

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> Finish:
        if len(set(counts)) == 1:
            return self._start("all_gather", lambda: self._gather(output, input))
        padded = input.new_empty(max(counts))
        padded[: input.numel()] = input.view(-1)
        gathered = input.new_empty(self.size, max(counts))

        def unpad() -> None:
            for row, part in zip(gathered, output.view(-1).split(counts), strict=True):
                part.copy_(row[: part.numel()])

        return self._start("all_gather", lambda: self._gather(gathered, padded), unpad)

    def _reduce_scatter(
        self, output: Tensor, input: Tensor, counts: list[int], op: str
    ) -> Callable[[], None]:
        own = counts[self.rank]
        inbox = input.new_empty(self.size, own)
        return self._start(
            "reduce_scatter",
            lambda: self._exchange(inbox, input, [own] * self.size, counts),
            lambda: rank_ordered_reduce(inbox.unbind(), op, output),
        )

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> Finish:
        return self._start("all_to_all", lambda: self._exchange(output, input, received, sent))

    def _broadcast(self, tensor: Tensor, src: int) -> Finish:
        data, root = _as_bytes(tensor), self._ranks[src]
        return self._start(
            "broadcast", lambda: dist.broadcast(data, root, self.process_group, async_op=True)
        )

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        # Gloo's send waits for its receiver, so two ranks that send first would wait for ever: a copy
        # is sent in the background, and kept until the transfer is done.
        self._sent = [entry for entry in self._sent if not entry[0].is_completed()]
        data = _as_bytes(tensor).clone()
        call = lambda: dist.isend(data, self._ranks[dst], self.process_group, tag)  # noqa: E731
        self._sequence += 1
        self._sent.append((self._guard("send", call, peer=dst), data, dst))

    def _recv(self, tensor: Tensor, src: int, tag: int) -> Finish:
        data, root = _as_bytes(tensor), self._ranks[src]
        return self._start(
            "recv", lambda: dist.irecv(data, root, self.process_group, tag), peer=src
        )

    def start_send(self, tensor: Tensor, dst: int, tag: int) -> Callable[[], None]:
        """Send without a copy; what it returns waits until ``tensor`` may be written again."""
        data = _as_bytes(tensor)
        return self._start("send", lambda: self.process_group.send([data], dst, tag), peer=dst)

    def start_recv(self, tensor: Tensor, src: int, tag: int) -> Callable[[], None]:
        """Receive while other work goes on; what it returns waits until ``tensor`` is filled."""
        data = _as_bytes(tensor)
        return self._start("recv", lambda: self.process_group.recv([data], src, tag), peer=src)

    def _barrier(self) -> Finish:
        return self._start("barrier", lambda: dist.barrier(self.process_group, async_op=True))

    def _close(self) -> None:
        try:
            if self._failure is None and self._sent:
                self._wait_for_sent()
        finally:
            self._sent.clear()
            self._closed = True

    def _wait_for_sent(self) -> None:
        """Wait as long as the group's timeout for all together: a peer may live and never ask."""
        device = self._sent[0][1].device
        limit = self.process_group._get_backend(device).options._timeout
        deadline = time.monotonic() + limit.total_seconds()
        for work, _, peer in self._sent:
            left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
            self._guard("send", partial(work.wait, left), peer=peer)

    def _gather(self, output: Tensor, input: Tensor) -> dist.Work:
        return _all_gather_single(
            _as_bytes(output), _as_bytes(input), self.process_group, async_op=True
        )

    def _exchange(
        self, inbox: Tensor, outbox: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> dist.Work:
        return dist.all_to_all_single(
            _as_bytes(inbox),
            _as_bytes(outbox),
            [count * inbox.itemsize for count in received],
            [count * outbox.itemsize for count in sent],
            self.process_group,
            async_op=True,
        )

    def _guard(
        self,
        operation: str,
        call: Callable[[], T],
        *,
        peer: int | None = None,
        sequence: int | None = None,
    ) -> T:
        if self._closed:
            raise PeerError(f"{operation}: the group '{self.name}' is closed")
        if self._failure is not None:
            raise self._failure
        try:
            return call()
        except RuntimeError as error:
            self._failure = self._explained(operation, sequence or self._sequence, error, peer)
            raise self._failure from error

    def _explained(
        self, operation: str, sequence: int, error: RuntimeError, peer: int | None
    ) -> PeerError:
        """What failed, and which ranks are missing: those that do not answer over torch's store."""
        if self.size == 2:
            peer = 1 - self.rank
        missing = lost_among(self._ranks)
        if missing is None and peer is not None:
            missing = (peer,)
        if missing is None:
            prefix = f"pyparallel/{self.name}/{'-'.join(map(str, self._ranks))}"
            store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
            missing = bounded_roll_call(store, self.rank, self.size)
        if missing is None:
            who = "unknown, since the machine of torch's store can't be reached either"
        else:
            who = ", ".join(map(str, missing)) or "none"
        named = PeerError(
            f"{operation} on group '{self.name}' (rank {self.rank} of {self.size}, call "
            f"{sequence}) failed, missing ranks: {who} ({str(error).splitlines()[0]})"
        )
        named.operation, named.sequence = operation, sequence
        named.group, named.missing = self.name, missing or ()
        return named

    def _start(
        self,
        operation: str,
        start: Callable[[], dist.Work],
        finish: Finish = None,
        *,
        peer: int | None = None,
    ) -> Callable[[], None]:
        """Start a call of torch's; what it returns waits for that, and then does ``finish``."""
        self._sequence += 1
        sequence = self._sequence
        handle = self._guard(operation, start, peer=peer)

        def complete() -> None:
            self._guard(operation, handle.wait, peer=peer, sequence=sequence)
            if finish is not None:
                finish()

        return complete


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: data movement then works for every dtype a backend may not know."""
    return tensor.view(-1).view(torch.uint8)
