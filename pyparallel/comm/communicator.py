"""The one interface through which ranks exchange bytes.

A communicator works on flat, contiguous buffers that the caller owns (destination passing) and knows
nothing of autograd, axes or modules; :mod:`pyparallel.comm.collectives` gives those. ``counts[r]`` is
the number of elements of rank r's part of a buffer; ``None`` means that all parts are equal.

The public methods are final: they check what they are given, in one place and with one wording
(:mod:`pyparallel.comm.checks`), and issue the engine's algorithm of the same name, ``_all_reduce`` and
its like, which may rely on what was checked.

Sums over ranks run in rank order, accumulate in fp32 and are rounded once, in every implementation, so
that all ranks, all runs and all engines give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch.distributed as dist
from torch import Tensor

from pyparallel.comm.checks import (
    Takes,
    check_input,
    check_moved,
    check_peer,
    check_reduced,
    check_reduction,
    check_source,
    message_counts,
    part_counts,
)
from pyparallel.comm.lost_hosts import naming_lost_hosts

# What an algorithm leaves to be done before its output may be read, if anything.
Finish = Callable[[], None] | None


class PeerError(RuntimeError):
    """A rank of the group is dead, stuck, or made another call than this one.

    Where a whole host is lost the message begins with it and its ranks.
    """

    def __init__(self, *args: object) -> None:
        message, more = args[:1], args[1:]
        super().__init__(*(naming_lost_hosts(str(said)) for said in message), *more)


class Work:
    """A collective under way. ``wait()`` returns when its output may be read."""

    def __init__(self, finish: Finish = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Communicator(ABC):
    """R ranks that can reach one another; every method is called by all of them, in one order.

    All methods raise:
        ValueError: an argument is not what the operation and the engine take.
        PeerError: a rank of the group is dead, stuck, or made another call.
    """

    rank: int
    size: int
    name: str
    # torch's group of the same ranks, where there is one.
    process_group: dist.ProcessGroup | None = None
    takes: Takes = Takes()

    @final
    def all_reduce(self, tensor: Tensor, *, op: str = "sum", async_op: bool = False) -> Work | None:
        """``tensor = op over ranks of tensor``, in place."""
        if not async_op and self._try_all_reduce(tensor, op):
            return None
        check_reduction("all_reduce", op)
        check_reduced("all_reduce", "tensor", tensor, self.takes)
        return self._issue(async_op, self._all_reduce, tensor, op)

    @final
    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """``output`` = the inputs of all ranks, one after another."""
        if not async_op and self._try_all_gather(output, input, counts):
            return None
        check_moved("all_gather", "output", output, self.takes)
        check_input("all_gather", input, output, self.takes)
        parts = part_counts(
            "all_gather", self.rank, self.size, ("output", output), ("input", input), counts
        )
        return self._issue(async_op, self._all_gather, output, input, parts)

    @final
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
        if not async_op and self._try_reduce_scatter(output, input, counts, op):
            return None
        check_reduction("reduce_scatter", op)
        check_reduced("reduce_scatter", "output", output, self.takes)
        check_input("reduce_scatter", input, output, self.takes)
        parts = part_counts(
            "reduce_scatter", self.rank, self.size, ("input", input), ("output", output), counts
        )
        return self._issue(async_op, self._reduce_scatter, output, input, parts, op)

    @final
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
        check_moved("all_to_all", "output", output, self.takes)
        check_input("all_to_all", input, output, self.takes)
        received = message_counts("all_to_all", "output", output, self.size, output_counts)
        sent = message_counts("all_to_all", "input", input, self.size, input_counts)
        return self._issue(async_op, self._all_to_all, output, input, received, sent)

    @final
    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work | None:
        """``tensor`` = rank ``src``'s, in place."""
        check_moved("broadcast", "tensor", tensor, self.takes)
        check_source("broadcast", src, self.size)
        return self._issue(async_op, self._broadcast, tensor, src)

    @final
    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        """Hand ``tensor`` to rank ``dst``; may return before it has arrived."""
        check_moved("send", "tensor", tensor, self.takes)
        check_peer("send", "dst", dst, self.rank, self.size, self.name)
        self._issue(False, self._send, tensor, dst, tag)

    @final
    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> None:
        """Fill ``tensor`` with what rank ``src`` sends."""
        check_moved("recv", "tensor", tensor, self.takes)
        check_peer("recv", "src", src, self.rank, self.size, self.name)
        self._issue(False, self._recv, tensor, src, tag)

    @final
    def barrier(self) -> None:
        """Return after every rank has entered."""
        self._issue(False, self._barrier)

    @final
    def close(self) -> None:
        """Give back what the communicator holds; it takes no more work afterwards."""
        self._close()

    # What an engine may do before anything is checked, with arguments that are plainly right: true if
    # it has made the call, false if it has done nothing.

    def _try_all_reduce(self, tensor: Tensor, op: str) -> bool:
        return False

    def _try_all_gather(self, output: Tensor, input: Tensor, counts: Sequence[int] | None) -> bool:
        return False

    def _try_reduce_scatter(
        self, output: Tensor, input: Tensor, counts: Sequence[int] | None, op: str
    ) -> bool:
        return False

    def _issue(self, async_op: bool, call: Callable[..., Finish], *arguments: Any) -> Work | None:
        """Make a checked call in its turn; without ``async_op``, finish it."""
        finish = call(*arguments)
        if async_op:
            return Work(finish)
        if finish is not None:
            finish()
        return None

    # The algorithms. Arguments are checked, and counts hold a number for every rank.

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, op: str) -> Finish: ...

    @abstractmethod
    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> Finish: ...

    @abstractmethod
    def _reduce_scatter(
        self, output: Tensor, input: Tensor, counts: list[int], op: str
    ) -> Finish: ...

    @abstractmethod
    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> Finish: ...

    @abstractmethod
    def _broadcast(self, tensor: Tensor, src: int) -> Finish: ...

    @abstractmethod
    def _send(self, tensor: Tensor, dst: int, tag: int) -> Finish: ...

    @abstractmethod
    def _recv(self, tensor: Tensor, src: int, tag: int) -> Finish: ...

    @abstractmethod
    def _barrier(self) -> Finish: ...

    @abstractmethod
    def _close(self) -> None: ...
