"""The one interface through which ranks exchange bytes, and its torch.distributed implementation.

A communicator works on flat, contiguous buffers that the caller owns (destination passing) and knows
nothing of autograd, axes or modules; :mod:`pyparallel.collectives` gives those. ``counts[r]`` is the
number of elements of rank r's part of a buffer; ``None`` means that all parts are equal.

Sums over ranks run in rank order, accumulate in fp32 and are rounded once, in every implementation, so
that all ranks, all runs and all engines give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# The name since torch 2.13, and the one before it.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

REDUCTIONS = ("sum", "max", "min")

# Up to this many bytes an all-reduce sends whole tensors to everyone (one step); above, each rank
# reduces its part and shares it (two steps, 2/R of the bytes).
ONE_SHOT_BYTES = 256 * 1024


class PeerError(RuntimeError):
    """A rank of the group is dead, stuck, or made another call than this one."""


class Work:
    """A collective under way. ``wait()`` returns when its output may be read."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Communicator(ABC):
    """R ranks that can reach one another; every method is called by all of them, in one order."""

    rank: int
    size: int
    name: str

    @abstractmethod
    def all_reduce(self, tensor: Tensor, *, op: str = "sum", async_op: bool = False) -> Work | None:
        """``tensor = op over ranks of tensor``, in place."""

    @abstractmethod
    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """``output`` = the inputs of all ranks, one after another."""

    @abstractmethod
    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        op: str = "sum",
        async_op: bool = False,
    ) -> Work | None:
        """``output`` = this rank's part of ``op over ranks of input``."""

    @abstractmethod
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """Part r of ``input`` goes to rank r; part r of ``output`` comes from rank r."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work | None:
        """``tensor`` = rank ``src``'s, in place."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        """Hand ``tensor`` to rank ``dst``; may return before it has arrived."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> None:
        """Fill ``tensor`` with what rank ``src`` sends."""

    @abstractmethod
    def barrier(self) -> None:
        """Return after every rank has entered."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the communicator holds; it takes no more work afterwards."""


class LocalCommunicator(Communicator):
    """The group of one: every collective is the identity."""

    def __init__(self, name: str = "local") -> None:
        self.rank, self.size, self.name = 0, 1, name

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", async_op: bool = False) -> Work | None:
        return Work() if async_op else None

    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        output.copy_(input.view(output.shape))
        return Work() if async_op else None

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        op: str = "sum",
        async_op: bool = False,
    ) -> Work | None:
        return self.all_gather(output, input, async_op=async_op)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        return self.all_gather(output, input, async_op=async_op)

    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work | None:
        return Work() if async_op else None

    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        raise ValueError(f"send: dst={dst}, but the group '{self.name}' has one rank")

    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> None:
        raise ValueError(f"recv: src={src}, but the group '{self.name}' has one rank")

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


def split_counts(length: int, parts: int, counts: Sequence[int] | None, what: str) -> list[int]:
    """``counts`` checked against a buffer of ``length`` elements, or equal parts."""
    if counts is None:
        if length % parts:
            raise ValueError(
                f"{what}: {length} elements do not divide by {parts} ranks; give counts="
            )
        return [length // parts] * parts
    if len(counts) != parts or sum(counts) != length:
        raise ValueError(
            f"{what}: counts {list(counts)} must be {parts} numbers that sum to the buffer's {length}"
        )
    return list(counts)


def _check_own(what: str, tensor: Tensor, count: int) -> None:
    if tensor.numel() != count:
        raise ValueError(f"{what}: expected this rank's {count} elements, got {tensor.numel()}")


def rank_ordered_reduce(parts: Sequence[Tensor], op: str, output: Tensor) -> None:
    """``output = op(parts[0], parts[1], ...)``, in that order, in fp32, rounded once."""
    wide = torch.float32 if output.is_floating_point() and output.itemsize < 4 else output.dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        if op == "sum":
            total += part
        elif op == "max":
            torch.maximum(total, part.to(wide), out=total)
        else:
            torch.minimum(total, part.to(wide), out=total)
    output.copy_(total.view(output.shape))


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
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._closed = False

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", async_op: bool = False) -> Work | None:
        if tensor.numel() * tensor.itemsize <= ONE_SHOT_BYTES or self.size == 2:
            copies = tensor.new_empty(self.size, tensor.numel())
            return self._run(
                "all_reduce",
                async_op,
                lambda: self._gather(copies, tensor),
                lambda: rank_ordered_reduce(copies.unbind(), op, tensor),
            )
        base, more = divmod(tensor.numel(), self.size)
        counts = [base + (rank < more) for rank in range(self.size)]
        own = tensor.new_empty(counts[self.rank])
        self.reduce_scatter(own, tensor, counts=counts, op=op)
        return self.all_gather(tensor, own, counts=counts, async_op=async_op)

    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        parts = split_counts(output.numel(), self.size, counts, "all_gather")
        _check_own("all_gather: input", input, parts[self.rank])
        if len(set(parts)) == 1:
            return self._run("all_gather", async_op, lambda: self._gather(output, input))
        padded = input.new_empty(max(parts))
        padded[: input.numel()] = input.reshape(-1)
        gathered = input.new_empty(self.size, max(parts))

        def unpad() -> None:
            for row, part in zip(gathered, output.view(-1).split(parts), strict=True):
                part.copy_(row[: part.numel()])

        return self._run("all_gather", async_op, lambda: self._gather(gathered, padded), unpad)

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        op: str = "sum",
        async_op: bool = False,
    ) -> Work | None:
        parts = split_counts(input.numel(), self.size, counts, "reduce_scatter")
        _check_own("reduce_scatter: output", output, parts[self.rank])
        inbox = input.new_empty(self.size, parts[self.rank])
        return self._run(
            "reduce_scatter",
            async_op,
            lambda: self._exchange(inbox, input, [parts[self.rank]] * self.size, parts),
            lambda: rank_ordered_reduce(inbox.unbind(), op, output),
        )

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        received = split_counts(output.numel(), self.size, output_counts, "all_to_all output")
        sent = split_counts(input.numel(), self.size, input_counts, "all_to_all input")
        return self._run(
            "all_to_all", async_op, lambda: self._exchange(output, input, received, sent)
        )

    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work | None:
        return self._run(
            "broadcast",
            async_op,
            lambda: dist.broadcast(
                _as_bytes(tensor), self._ranks[src], self.process_group, async_op=True
            ),
        )

    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        # Gloo's send waits for its receiver, so two ranks that send first would wait for ever: a copy
        # is sent in the background, and kept until the transfer is done.
        self._sent = [(work, data) for work, data in self._sent if not work.is_completed()]
        data = _as_bytes(tensor).clone()
        call = lambda: dist.isend(data, self._ranks[dst], self.process_group, tag)  # noqa: E731
        self._sent.append((self._guard("send", call), data))

    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> None:
        self._run(
            "recv",
            False,
            lambda: dist.irecv(_as_bytes(tensor), self._ranks[src], self.process_group, tag),
        )

    def barrier(self) -> None:
        self._run("barrier", False, lambda: dist.barrier(self.process_group, async_op=True))

    def close(self) -> None:
        for work, _ in self._sent:
            self._guard("send", work.wait)
        self._sent.clear()
        self._closed = True

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

    def _guard(self, operation: str, call: Callable[[], object]) -> object:
        if self._closed:
            raise PeerError(f"{operation}: the group '{self.name}' is closed")
        try:
            return call()
        except RuntimeError as error:
            raise PeerError(
                f"{operation} on group '{self.name}' (rank {self.rank} of {self.size}): {error}"
            ) from error

    def _run(
        self,
        operation: str,
        async_op: bool,
        start: Callable[[], dist.Work],
        finish: Callable[[], None] | None = None,
    ) -> Work | None:
        handle = self._guard(operation, start)

        def complete() -> None:
            self._guard(operation, handle.wait)
            if finish is not None:
                finish()

        if async_op:
            return Work(complete)
        complete()
        return None


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: data movement then works for every dtype a backend may not know."""
    return tensor.view(-1).view(torch.uint8)
