"""Groups that span machines: shared memory inside each, torch.distributed between them.

Every machine's ranks are consecutive, and all of them carry a part of what goes between machines
(:mod:`pyparallel.comm.spanning.lanes`). Long tensors go in slices, many under way at once
(:mod:`pyparallel.comm.spanning.ticks`); of short ones every rank's is sent to everybody, at once.

Sums keep the rank order, and with it the bits of a single machine: a running total, in fp32 where the
type is narrower, goes through the machines in order, each adding its ranks' contributions one by one.
docs/collectives.md has what each call costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from pyparallel.comm.call_order import CallOrder
from pyparallel.comm.checks import Takes
from pyparallel.comm.communicator import Communicator, PeerError, Work
from pyparallel.comm.rank_order import rank_ordered_reduce
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.shared.host_tensors import CODES
from pyparallel.comm.spanning.desk import GOT, PUT_IN, Desk
from pyparallel.comm.spanning.gather import broadcast_short, gather_short, gathered
from pyparallel.comm.spanning.machines import Machines
from pyparallel.comm.spanning.ticks import Slice, in_ticks
from pyparallel.comm.torch_engine import TorchCommunicator

# A slice costs each rank some messages and a wait for its neighbours, whatever its size: so it is not
# short. Nor is it long: the last one's way through all machines is not hidden behind others, and what is
# on the desks of a machine's ranks should stay in the cache.
SHORTEST_SLICE, LONGEST_SLICE = 1 << 20, 4 << 20
# So many slices for each machine, between those two.
SLICES_A_MACHINE = 3
# Up to this many bytes of all ranks together go from everybody to everybody, in one hop.
SHORT_BYTES = 64 * 1024
# Neighbours wait for the network too, whose threads need the cores.
REST_AFTER_S = 0.0002


class HierarchicalCommunicator(Communicator):
    """Ranks of several machines; made by :func:`pyparallel.comm.connect.connect`."""

    takes = Takes("cpu", moved=CODES, reduced=CODES)

    def __init__(
        self,
        between: TorchCommunicator,
        inside: SharedMemoryCommunicator,
        machines: Sequence[Sequence[int]],
        machine: int,
    ) -> None:
        """Join two engines.

        Args:
            between: over all ranks; used between machines.
            inside: over this machine's ranks.
            machines: the ranks of each machine, consecutive, machines in order.
            machine: the index of this rank's.
        """
        self.rank, self.size, self.name = between.rank, between.size, between.name
        self._between = between
        self._inside = inside
        self._machines = [list(ranks) for ranks in machines]
        self._machine = machine
        self._desk = Desk(inside, LONGEST_SLICE)
        self._over = Machines(between, inside, self._desk, self._machines, machine)
        inside.engine.rest_after_s = REST_AFTER_S
        self._order = CallOrder(self.name)
        self._failure: PeerError | None = None

    def _issue(self, async_op: bool, call: Callable[..., None], *arguments: Any) -> Work | None:
        return self._order.run(async_op, self._guarded, call, *arguments)

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """The call, unless one before it failed: of two engines one may still seem to work."""
        if self._failure is not None:
            raise self._failure
        try:
            call(*arguments)
        except PeerError as error:
            self._failure = error
            raise

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        flat = tensor.view(-1)
        if self.size * flat.nbytes <= SHORT_BYTES:
            rank_ordered_reduce(self._everybodys(flat), op, flat)
            return
        slices = (
            self._reduced(slice, op, number)
            for number, slice in _numbered(_slices(flat, self._slice_bytes(flat)))
        )
        self._run(slices, "all_reduce", op, flat.numel())

    def _reduced(self, slice: Tensor, op: str, number: int | None) -> Slice:
        over, pending = self._over, self._over.pending()
        # A machine between others takes in a total and a result of each slice, the last one only a
        # total: some slices that skip the former make up for it.
        skips = over.may_skip() and (number or 0) % over.last == 0
        yield from over.fold(slice, op, over.own(slice), pending, skips=skips)
        yield from over.spread(slice, over.last, number, pending)
        pending.settle()

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        flat = input.view(-1)
        if self.size * flat.nbytes <= SHORT_BYTES:
            parts = [row.split(counts)[self.rank] for row in self._everybodys(flat)]
            rank_ordered_reduce(parts, op, output)
            return
        ends = list(accumulate(counts, initial=0))
        num_bytes = self._slice_bytes(flat)
        slices = (
            self._scattered(output.view(-1), slice, op, machine, start, ends)
            for machine, ranks in enumerate(self._machines)
            for start, slice in _placed_slices(flat, ends[ranks[0]], ends[ranks[-1] + 1], num_bytes)
        )
        self._run(slices, "reduce_scatter", op, counts)

    def _scattered(
        self, output: Tensor, slice: Tensor, op: str, machine: int, start: int, ends: list[int]
    ) -> Slice:
        """Reduce what lies at ``start`` of the input and belongs to ranks of ``machine``."""
        over, pending = self._over, self._over.pending()
        own = pending.memory(over.own(slice).numel(), slice.dtype)
        yield from over.fold(slice, op, own, pending)
        yield from over.give(slice, own, machine, pending)
        if self._machine == machine:
            self._desk.show(GOT, own)
        yield
        if self._machine == machine:
            first, last = ends[self.rank] - start, ends[self.rank + 1] - start
            for rank, (begin, end) in enumerate(over.parts(slice)):
                begin_here, end_here = max(begin, first), min(end, last)
                if begin_here >= end_here:
                    continue
                part, skipped = output[begin_here - first : end_here - first], begin_here - begin
                if rank == self._inside.rank:
                    part.copy_(own[skipped : skipped + part.numel()])
                else:
                    part.copy_(self._desk.read(GOT, rank, part, skipped))
        pending.settle()

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        flat = output.view(-1)
        if flat.nbytes <= SHORT_BYTES:
            gather_short(self._over, flat, input.view(-1), counts)
            return
        parts = flat.split(counts)
        parts[self.rank].copy_(input.view(-1))
        num_bytes = self._slice_bytes(flat) // self.size
        pieces = (_slices(part, num_bytes) for part in parts)
        rounds = enumerate(zip_longest(*pieces, fillvalue=flat[:0]))
        slices = (gathered(self._over, round, number) for number, round in rounds)
        self._run(slices, "all_gather", counts)

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> None:
        local = self._machines[self._machine]
        outgoing = input.view(-1).split(sent)
        incoming = output.view(-1).split(received)
        remote = [rank for rank in range(self.size) if rank not in local]
        for peer in remote:
            if sent[peer]:
                self._between.send(outgoing[peer], peer)
        first, after = local[0], local[-1] + 1
        self._inside.all_to_all(
            output.view(-1)[sum(received[:first]) : sum(received[:after])],
            input.view(-1)[sum(sent[:first]) : sum(sent[:after])],
            output_counts=received[first:after],
            input_counts=sent[first:after],
        )
        for peer in remote:
            if received[peer]:
                self._between.recv(incoming[peer], peer)

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        root = next(m for m, ranks in enumerate(self._machines) if src in ranks)
        flat = tensor.view(-1)
        if flat.nbytes <= SHORTEST_SLICE:
            if flat.numel():
                broadcast_short(self._over, flat, src, root)
            return
        told = (
            self._told(slice, src, root, number)
            for number, slice in _numbered(_slices(flat, self._slice_bytes(flat)))
        )
        self._run(told, "broadcast", src, tensor.numel())

    def _told(self, slice: Tensor, src: int, root: int, number: int | None) -> Slice:
        pending = self._over.pending()
        if self._machine == root:
            self._desk.show(PUT_IN, slice if self.rank == src else slice[:0])
        yield
        if self._machine == root and self.rank != src:
            slice.copy_(self._desk.read(PUT_IN, self._over.local(src), slice))
        yield from self._over.spread(slice, root, number, pending, whole=True)
        pending.settle()

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        local = self._machines[self._machine]
        if dst in local:
            self._inside.send(tensor, local.index(dst), tag=tag)
        else:
            self._between.send(tensor, dst, tag=tag)

    def _recv(self, tensor: Tensor, src: int, tag: int) -> None:
        local = self._machines[self._machine]
        if src in local:
            self._inside.recv(tensor, local.index(src), tag=tag)
        else:
            self._between.recv(tensor, src, tag=tag)

    def _barrier(self) -> None:
        self._all_reduce(torch.zeros(1), "sum")

    def _close(self) -> None:
        self._order.close()
        self._desk.close()
        self._inside.close()
        self._between.close()

    def _everybodys(self, flat: Tensor) -> Sequence[Tensor]:
        """The tensors of all ranks."""
        rows = flat.new_empty(self.size, flat.numel())
        gather_short(self._over, rows.view(-1), flat, [flat.numel()] * self.size)
        return rows.unbind()

    def _slice_bytes(self, tensor: Tensor) -> int:
        wanted = tensor.nbytes // (SLICES_A_MACHINE * len(self._machines))
        return min(max(wanted, SHORTEST_SLICE), LONGEST_SLICE)

    def _run(self, slices: Iterable[Slice], *call: object) -> None:
        """Run the slices of a call, whose description all ranks of this machine must agree on."""
        self._desk.begin(crc32(repr(call).encode()))
        in_ticks(slices, self._desk.next_tick)


def _slices(flat: Tensor, num_bytes: int) -> Sequence[Tensor]:
    return flat.split(max(1, num_bytes // flat.itemsize)) if flat.numel() else []


def _numbered(slices: Sequence[Tensor]) -> list[tuple[int | None, Tensor]]:
    """The slices with their numbers; None for a single one, which nothing could hide behind."""
    return [(number if len(slices) > 1 else None, slice) for number, slice in enumerate(slices)]


def _placed_slices(
    flat: Tensor, start: int, stop: int, num_bytes: int
) -> Iterator[tuple[int, Tensor]]:
    """The slices between two places, each with its own."""
    for slice in _slices(flat[start:stop], num_bytes):
        yield start, slice
        start += slice.numel()
