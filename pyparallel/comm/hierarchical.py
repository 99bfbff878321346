"""Groups that span machines: shared memory inside each, torch.distributed between them.

Every machine's ranks are consecutive. K lanes, K being the fewest ranks on any machine, carry the
traffic between machines: local rank l < K of every machine handles piece l of the data, so all of a
machine's ranks share its network.

Sums keep the rank order, and with it the bits of a single machine: a running total, in fp32 where the
type is narrower, goes through the machines in order, each adding its ranks' contributions one by one.

Cost of an all-reduce of n bytes over M machines of L ranks: inside, one all-to-all of n and one
all-gather of n; between machines 2 (M - 1) steps of n / L a lane (twice that for 16-bit types, whose
totals travel in fp32 on the way there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyparallel.comm.call_order import CallOrder
from pyparallel.comm.checks import Takes
from pyparallel.comm.communicator import Communicator, Work
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.shared.host_tensors import CODES
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.cut.shares import part_sizes

_FOLDS = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


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
        self._lanes = min(len(ranks) for ranks in self._machines)
        # This rank's counterparts, one on each machine; none if it carries no lane.
        self._counterparts = (
            [ranks[inside.rank] for ranks in self._machines] if inside.rank < self._lanes else []
        )
        self._order = CallOrder(self.name)

    def _issue(self, async_op: bool, call: Callable[..., None], *arguments: Any) -> Work | None:
        return self._order.run(async_op, call, *arguments)

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        flat = tensor.view(-1)
        pieces = self._pieces(flat.numel())
        total = self._fold_over_ranks(flat, pieces, op, last=len(self._machines) - 1)
        if self._counterparts and total.numel():
            # The last machine has the result; the others take it from there.
            if self._machine == len(self._machines) - 1:
                for peer in self._counterparts[:-1]:
                    self._between.send(total, peer)
            else:
                self._between.recv(total, self._counterparts[-1])
        self._inside.all_gather(flat, total, counts=pieces)

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        blocks = self._blocks(input.view(-1), counts)
        for machine, block in enumerate(blocks):
            pieces = self._pieces(block.numel())
            total = self._fold_over_ranks(block, pieces, op, last=machine)
            if machine == self._machine:
                whole = torch.empty_like(block)
                self._inside.all_gather(whole, total, counts=pieces)
                local = [counts[rank] for rank in self._machines[machine]]
                output.view(-1).copy_(whole.split(local)[self._inside.rank])

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        blocks = self._blocks(output.view(-1), counts)
        local = [counts[rank] for rank in self._machines[self._machine]]
        self._inside.all_gather(blocks[self._machine], input.view(-1), counts=local)
        if self._counterparts:
            own = blocks[self._machine]
            piece = own.split(self._pieces(own.numel()))[self._inside.rank]
            for machine, peer in enumerate(self._counterparts):
                if machine != self._machine and piece.numel():
                    self._between.send(piece, peer)
        for machine, block in enumerate(blocks):
            if machine == self._machine:
                continue
            pieces = self._pieces(block.numel())
            piece = block.split(pieces)[self._inside.rank]
            if piece.numel():
                self._between.recv(piece, self._counterparts[machine])
            self._inside.all_gather(block, piece, counts=pieces)

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
        local = self._machines[self._machine]
        if src in local:
            if self.rank == src:
                for ranks in self._machines:
                    if src not in ranks:
                        self._between.send(tensor, ranks[0])
            self._inside.broadcast(tensor, local.index(src))
        else:
            if self.rank == local[0]:
                self._between.recv(tensor, src)
            self._inside.broadcast(tensor, 0)

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
        self._inside.close()
        self._between.close()

    def _fold_over_ranks(self, flat: Tensor, pieces: list[int], op: str, *, last: int) -> Tensor:
        """Fold ``flat`` over all ranks, each local rank its piece; the result is on machine ``last``.

        On the other machines, and for local ranks without a lane, the values are undefined.
        """
        length = pieces[self._inside.rank]
        contributions = flat.new_empty(self._inside.size, length)
        self._inside.all_to_all(
            contributions.view(-1),
            flat,
            output_counts=[length] * self._inside.size,
            input_counts=pieces,
        )
        result = flat.new_empty(length)
        if length == 0:
            return result
        narrow = flat.dtype in (torch.float16, torch.bfloat16)
        total = torch.empty(length, dtype=torch.float32 if narrow else flat.dtype)
        rows = list(contributions.unbind())
        if self._machine == 0:
            total.copy_(rows.pop(0))
        else:
            self._between.recv(total, self._counterparts[self._machine - 1])
        for row in rows:
            _FOLDS[op](total, row.to(total.dtype), out=total)
        final = len(self._machines) - 1
        if self._machine < final:
            self._between.send(total, self._counterparts[self._machine + 1])
        elif last != final:
            self._between.send(total, self._counterparts[last])
        if self._machine == last and last != final:
            self._between.recv(total, self._counterparts[final])
        return result.copy_(total)

    def _pieces(self, length: int) -> list[int]:
        """``length`` cut over the lanes; nothing for local ranks without one."""
        return part_sizes(length, self._lanes) + [0] * (self._inside.size - self._lanes)

    def _blocks(self, flat: Tensor, parts: list[int]) -> list[Tensor]:
        """``flat``, the parts of all ranks, cut by machine."""
        return list(flat.split([sum(parts[rank] for rank in ranks) for ranks in self._machines]))
