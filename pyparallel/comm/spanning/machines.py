"""How a slice of a tensor is summed through several machines, and spread over them.

The rank of a machine that carries a lane (``lanes.py``) exchanges it with the same lane's carriers on
other machines, and with its own machine's ranks over the desk (``desk.py``). What is here are stages of
:mod:`pyparallel.comm.spanning.ticks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pyparallel.comm.rank_order import accumulator, rank_ordered_reduce
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.spanning.desk import GOT, PUT_IN, Desk
from pyparallel.comm.spanning.lanes import Lane, carried, lanes
from pyparallel.comm.spanning.ticks import Slice, ticks
from pyparallel.comm.torch_engine import TorchCommunicator

# Fewer bytes are not worth a message of their own.
GRAIN_BYTES = 64 * 1024
# Tags of what goes between two ranks, far from those that users give. Of one tag the order is that of
# the slices; a slice on its round through the machines may overtake another, so each of those that are
# under way has a tag of its own.
FORWARD, RAW = 2**31 - 1, 2**31 - 2
ROUNDS = 1024
SPREAD = RAW - ROUNDS


class Pending:
    """What a slice has to wait for before it ends, and the memory that it used until then."""

    def __init__(self, pool: list[Tensor]) -> None:
        self._pool = pool
        self._used: list[Tensor] = []
        self.waits: list[Callable[[], None]] = []

    def memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, until :meth:`settle`."""
        # What is made in inference mode may not change its size outside.
        with torch.inference_mode(False):
            buffer = self._pool.pop() if self._pool else torch.empty(0, dtype=torch.uint8)
            self._used.append(buffer)
            return buffer.resize_(numel * dtype.itemsize).view(dtype)

    def settle(self) -> None:
        for wait in self.waits:
            wait()
        self._pool += self._used


class Machines:
    """The machines of a group, and the two engines that reach their ranks.

    Args:
        between: over all ranks.
        inside: over this machine's ranks.
        desk: this machine's.
        ranks: the ranks of each machine, consecutive, machines in order.
        index: this rank's machine.
    """

    def __init__(
        self,
        between: TorchCommunicator,
        inside: SharedMemoryCommunicator,
        desk: Desk,
        ranks: Sequence[Sequence[int]],
        index: int,
    ) -> None:
        self.between, self.inside, self.desk = between, inside, desk
        self.ranks = [list(local) for local in ranks]
        self.index, self.last = index, len(ranks) - 1
        self._sizes = tuple(map(len, ranks))
        self._pool: list[Tensor] = []

    def pending(self) -> Pending:
        """For a new slice."""
        return Pending(self._pool)

    def local(self, rank: int) -> int:
        """The place of a rank among those of this machine."""
        return rank - self.ranks[self.index][0]

    def parts(self, slice: Tensor) -> list[tuple[int, int]]:
        """From where to where each rank of this machine carries the slice."""
        counts = carried(slice.numel(), self.inside.size, _grain(slice))
        return list(pairwise(accumulate(counts, initial=0)))

    def own(self, slice: Tensor) -> Tensor:
        """The part of the slice that this rank carries."""
        start, stop = self.parts(slice)[self.inside.rank]
        return slice[start:stop]

    def may_skip(self) -> bool:
        """Whether a slice may go past the machines between the first and the last at no cost."""
        return self.last > 1 and set(self._sizes[1:-1]) == {1}

    def fold(
        self, slice: Tensor, op: str, result: Tensor, pending: Pending, *, skips: bool = False
    ) -> Slice:
        """Reduce over all ranks in their order: ``last + 1`` stages, and into the next.

        A running total in the accumulator's type passes the machines, each of which adds its ranks'
        values one by one. The last rounds it into ``result``, which is as long as :meth:`own`.

        Args:
            skips: the total goes from the first machine to the last, and what the rank of each machine
                between has goes there too; where :meth:`may_skip`.
        """
        mine, wide = self._lanes(slice), accumulator(slice.dtype)
        total = pending.memory(result.numel(), wide)
        before, after = (0, self.last) if skips else (self.index - 1, self.index + 1)
        arrivals: list[Callable[[], None]] = []
        skipped: list[Tensor] = []
        if skips and 0 < self.index < self.last:
            # This machine's only rank carries all of the slice.
            yield from ticks(self.index + 1)
            pending.waits += self._send(slice, mine, self.last, RAW)
            yield from ticks(self.last - self.index)
            return
        if self.index > 0:
            arrivals = self._receive(total, mine, before, FORWARD)
        for machine in range(before + 1, self.index):
            skipped.append(pending.memory(result.numel(), slice.dtype))
            raw = self._receive(skipped[-1], mine, machine, RAW)
            arrivals = [_both(*waits) for waits in zip(arrivals, raw, strict=True)]
        yield from ticks(self.index)
        self._show_others_theirs(slice)
        yield
        for number, (lane, start, stop) in enumerate(mine):
            terms = [self._row(rank, slice, lane) for rank in range(self.inside.size)]
            if arrivals:
                arrivals[number]()
                terms[:0] = [row[start:stop] for row in (total, *skipped)]
            if self.index == self.last:
                rank_ordered_reduce(terms, op, result[start:stop])
                continue
            if len(terms) > 1 or slice.dtype != wide:
                rank_ordered_reduce(terms, op, total[start:stop])
                terms = [total[start:stop]]
            pending.waits += self._send(terms[0], [(lane, 0, stop - start)], after, FORWARD)
        yield from ticks(self.last - self.index)

    def give(self, slice: Tensor, own: Tensor, machine: int, pending: Pending) -> Slice:
        """Bring ``own`` of the last machine to another: the rest of a stage, and into the next."""
        mine = self._lanes(slice)
        arrivals: list[Callable[[], None]] = []
        if machine != self.last and self.index == self.last:
            pending.waits += self._send(own, mine, machine, SPREAD)
        elif machine != self.last and self.index == machine:
            arrivals = self._receive(own, mine, self.last, SPREAD)
        yield
        for wait in arrivals:
            wait()

    def spread(
        self, slice: Tensor, root: int, number: int | None, pending: Pending, *, whole: bool = False
    ) -> Slice:
        """Bring the slice, of which machine ``root``'s ranks have their :meth:`own`, to all ranks.

        The rest of a stage, ``last`` more, and into another. It goes from machine to machine, in an
        order that begins with another one for each ``number``: so each passes on its share, and never
        more than one slice at a time. Without a number the root sends it to all.

        Args:
            whole: whether machine ``root``'s ranks have all of the slice.
        """
        mine, own = self._lanes(slice), self.own(slice)
        others = [m for m in range(self.last + 1) if m != root]
        tag = SPREAD + (number or 0) % ROUNDS
        if number is not None:
            turn = -number % len(others)
            others = others[turn:] + others[:turn]
        arrivals: list[Callable[[], None]] = []
        hops, receivers = 0, others if number is None else others[:1]
        if self.index != root:
            hops = 1 if number is None else others.index(self.index) + 1
            source = root if hops == 1 else others[hops - 2]
            arrivals = self._receive(own, mine, source, tag)
            receivers = [] if number is None else others[hops : hops + 1]
        yield from ticks(hops)
        for wait in arrivals:
            wait()
        for machine in receivers:
            pending.waits += self._send(own, mine, machine, tag)
        yield from ticks(self.last - hops)
        lacks = not (whole and self.index == root)
        if lacks:
            self.desk.show(GOT, own)
        yield
        for rank, (start, stop) in enumerate(self.parts(slice) if lacks else ()):
            if rank != self.inside.rank and start < stop:
                slice[start:stop].copy_(self.desk.read(GOT, rank, slice[start:stop]))

    def _lanes(self, slice: Tensor) -> list[tuple[Lane, int, int]]:
        """The lanes that this rank carries, each with its start and stop in :meth:`own`."""
        rank = self.inside.rank
        first, _ = self.parts(slice)[rank]
        return [
            (lane, lane.start - first, lane.stop - first)
            for lane in lanes(slice.numel(), self._sizes, _grain(slice))
            if lane.carriers[self.index] == rank
        ]

    def _show_others_theirs(self, slice: Tensor) -> None:
        """Let each rank of this machine read what it carries, in its place."""
        for rank, (start, stop) in enumerate(self.parts(slice)):
            if rank != self.inside.rank:
                self.desk.show(PUT_IN, slice[start:stop], start)

    def _row(self, rank: int, slice: Tensor, lane: Lane) -> Tensor:
        """The lane's elements of a rank of this machine, for reading."""
        piece = slice[lane.start : lane.stop]
        if rank == self.inside.rank:
            return piece
        return self.desk.read(PUT_IN, rank, piece, lane.start)

    def _send(
        self, own: Tensor, mine: Sequence[tuple[Lane, int, int]], machine: int, tag: int
    ) -> list[Callable[[], None]]:
        return [
            self.between.start_send(own[a:b], self.ranks[machine][lane.carriers[machine]], tag)
            for lane, a, b in mine
        ]

    def _receive(
        self, own: Tensor, mine: Sequence[tuple[Lane, int, int]], machine: int, tag: int
    ) -> list[Callable[[], None]]:
        return [
            self.between.start_recv(own[a:b], self.ranks[machine][lane.carriers[machine]], tag)
            for lane, a, b in mine
        ]


def _grain(slice: Tensor) -> int:
    return GRAIN_BYTES // slice.itemsize


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def wait() -> None:
        first()
        second()

    return wait
