"""The one interface through which ranks exchange bytes.

A communicator works on flat, contiguous buffers that the caller owns (destination passing) and knows
nothing of autograd, axes or modules; :mod:`pyparallel.comm.collectives` gives those. ``counts[r]`` is
the number of elements of rank r's part of a buffer; ``None`` means that all parts are equal.

Sums over ranks run in rank order, accumulate in fp32 and are rounded once, in every implementation, so
that all ranks, all runs and all engines give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

REDUCTIONS = ("sum", "max", "min")


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
    # torch's group of the same ranks, where there is one.
    process_group: dist.ProcessGroup | None = None

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


def check_own(what: str, tensor: Tensor, count: int) -> None:
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
