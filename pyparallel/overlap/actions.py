"""What the steps of a schedule do to tensors; the same functions on CUDA streams and CPU threads.

A `Link` moves rows between ranks, a `Multiply` is the matmul. Neither knows the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyparallel.overlap.layout import Layout
from pyparallel.overlap.schedule import Region, Step

# multiply(rows [m, a], out [m, b]): out = rows @ (something of shape [a, b]).
Multiply = Callable[[Tensor, Tensor], None]
# rank_ordered_sum(parts [R, m, b], out [m, b]): fp32 sum over R in order, rounded once.
Reduce = Callable[[Tensor, Tensor], None]
Action = Callable[[Step], None]
# view(*indices): the memory of one region of a buffer.
View = Callable[..., Tensor]


class Link(Protocol):
    """Point-to-point and whole-group transport of one group, issued in the same order on all ranks."""

    def buffer(self, name: str, shape: Sequence[int], like: Tensor, *, elements: int) -> Tensor:
        """Memory for what travels: a link that registers memory hands out some that it knows.

        elements: what the rank with the largest shape needs; the same on all ranks. What a call of
        the same name returned before is overwritten.
        """

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        """Sends one tensor and receives another, as one group, so that no order can deadlock."""

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        """output [sum(rows), K] = the shards of all ranks in rank order."""

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        """Sends rows_out[q] rows to rank q; output [R, own rows, N] is what came, by source."""


class Shared(Protocol):
    """A matrix of every rank, each of which the others can copy rows out of."""

    own: Tensor

    def pull(self, peer: int, begin: int, out: Tensor) -> None:
        """out [m, columns] = rows begin .. begin + m of the peer's matrix."""


class CopyLink(Link, Protocol):
    """A Link whose ranks can also address parts of one another's memory."""

    def share(self, name: str, rows: int, columns: int, like: Tensor) -> Shared:
        """[rows, columns] on every rank, in the same memory in every call of that name.

        A call of all ranks, with the same arguments.
        """

    def meet(self) -> None:
        """Ends on no rank before it has started on all."""


def check_link(link: Link, transport: str) -> None:
    """Raises ValueError for a transport that needs more than the link can do."""
    if transport == "copy" and not hasattr(link, "share"):
        raise ValueError(
            f"transport: expected 'direct' or 'ring' over {type(link).__name__}, whose ranks do not "
            f"address one another's memory, got 'copy'"
        )


def rank_ordered_sum(parts: Tensor, out: Tensor) -> None:
    """The portable Reduce: parts [R, m, n] summed from rank 0 upwards in fp32, rounded once."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)


class GatherSide:
    """The actions of an all-gather that feeds a matmul.

    own [M_r, K], multiply maps [m, K] to [m, N], output [M, N].
    gathered: [M, K] to keep all rows in order, or [slots, largest piece, K] reused in turn.
    """

    def __init__(
        self,
        own: Tensor,
        gathered: Tensor,
        output: Tensor,
        *,
        rank: int,
        layout: Layout,
        link: Link,
        multiply: Multiply,
        names: tuple[str, str, str],
        transport: str = "direct",
    ) -> None:
        check_link(link, transport)
        self.own, self.gathered, self.output = own, gathered, output
        self.rank, self.layout, self.link, self.multiply = rank, layout, link, multiply
        self.own_name, self.gathered_name, self.output_name = names
        self.published: Shared | None = None
        if transport == "copy":
            self.published = link.share("published", max(layout.rows), own.shape[1], own)

    def actions(self) -> dict[str, Action]:
        """Action name to function, for the steps `gather.py` and `steps.py` make."""
        return {
            "gather": self.exchange,
            "publish": self.publish,
            "meet": self.meet,
            "pull": self.pull,
            "copy_own": self.copy_own,
            "matmul": self.matmul,
            "gather_all": self.gather_all,
            "matmul_all": self.matmul_all,
        }

    def views(self) -> dict[str, View]:
        """Buffer name to the memory its indices mean."""
        views: dict[str, View] = {
            self.own_name: lambda piece: self.own[self.layout.local(self.rank, piece)],
            self.gathered_name: self._gathered_view,
            self.output_name: lambda q, p: self.output[self.layout.rows_of(q, p)],
        }
        if (published := self.published) is not None:
            views["published"] = lambda piece: published.own[self.layout.local(self.rank, piece)]
        return views

    def _gathered_view(self, *indices: int) -> Tensor:
        if not indices:
            return self.gathered
        if len(indices) == 1:
            return self.gathered[indices[0]]
        return self.gathered[self.layout.rows_of(*indices)]

    def _place(self, region: Region, chunk: tuple[int, int]) -> Tensor:
        name, *indices = region
        rows = self.layout.local(*chunk)
        return self.views()[str(name)](*indices)[: rows.stop - rows.start]

    def exchange(self, step: Step) -> None:
        """Receives one chunk into its place while sending another one."""
        send = self._place(step.reads[0], step.send_chunk)
        receive = self._place(step.writes[0], step.receive_chunk)
        self.link.exchange(send, step.send_to, receive, step.receive_from)

    def publish(self, step: Step) -> None:
        """The own shard to where the peers copy it from."""
        self.published.own[: self.own.shape[0]].copy_(self.own)

    def meet(self, step: Step) -> None:
        """Waits for all ranks."""
        self.link.meet()

    def pull(self, step: Step) -> None:
        """One chunk out of its owner's memory into its place."""
        place = self._place(step.writes[0], step.chunk)
        begin = self.layout.local(*step.chunk).start
        self.published.pull(step.pull_from, begin, place)

    def matmul(self, step: Step) -> None:
        """The rows of one chunk, or of the whole own shard (piece -1)."""
        source, piece = step.chunk
        rows = self.own if piece < 0 else self._place(step.reads[0], step.chunk)
        self.multiply(rows, self.output[self.layout.rows_of(source, piece)])

    def copy_own(self, step: Step) -> None:
        """The own shard to its place among the gathered rows."""
        self.gathered[self.layout.rows_of(self.rank)].copy_(self.own)

    def gather_all(self, step: Step) -> None:
        """The plain collective."""
        self.link.all_gather(self.gathered, self.own, self.layout.rows)

    def matmul_all(self, step: Step) -> None:
        """All gathered rows, one matmul a rank: the shapes, and so the bits, of the overlapped path."""
        for rank in range(len(self.layout.rows)):
            rows = self.layout.rows_of(rank)
            self.multiply(self.gathered[rows], self.output[rows])


class ScatterSide:
    """The actions of a matmul whose partial sums are reduce-scattered.

    rows [M, K], multiply maps [m, K] to [m, N], partial [M, N] (shared where the peers copy out of it),
    landed [R, M_r, N], output [M_r, N].
    """

    def __init__(
        self,
        rows: Tensor,
        partial: Tensor | Shared,
        landed: Tensor,
        output: Tensor,
        *,
        rank: int,
        layout: Layout,
        link: Link,
        multiply: Multiply,
        reduce: Reduce,
        names: tuple[str, str],
    ) -> None:
        self.shared = None if isinstance(partial, Tensor) else partial
        self.partial = partial if isinstance(partial, Tensor) else partial.own
        self.rows, self.landed, self.output = rows, landed, output
        self.rank, self.layout, self.link = rank, layout, link
        self.multiply, self.reduce_rows = multiply, reduce
        self.rows_name, self.output_name = names

    def actions(self) -> dict[str, Action]:
        """Action name to function, for the steps `scatter.py` and `steps.py` make."""
        return {
            "partial": self.matmul,
            "scatter": self.exchange,
            "meet": self.meet,
            "pull_partial": self.pull,
            "reduce": self.reduce,
            "matmul_all": self.matmul_all,
            "reduce_scatter_all": self.reduce_scatter_all,
        }

    def views(self) -> dict[str, View]:
        """Buffer name to the memory its indices mean."""
        return {
            self.rows_name: lambda q, p: self.rows[self.layout.rows_of(q, p)],
            "partial": lambda q, p: self.partial[self.layout.rows_of(q, p)],
            "landed": lambda q, p: self.landed[q][self.layout.local(self.rank, p)],
            self.output_name: lambda p: self.output[self.layout.local(self.rank, p)],
        }

    def matmul(self, step: Step) -> None:
        """A remote chunk's partial sum, to be sent; or the own rows', straight to their slot."""
        target, piece = step.chunk
        rows = self.rows[self.layout.rows_of(target, piece)]
        if target == self.rank:
            self.multiply(rows, self.landed[target][self.layout.local(target, piece)])
        else:
            self.multiply(rows, self.partial[self.layout.rows_of(target, piece)])

    def exchange(self, step: Step) -> None:
        """Sends a partial sum to its owner while one of the own rows arrives."""
        send = self.partial[self.layout.rows_of(*step.send_chunk)]
        source, piece = step.receive_chunk
        receive = self.landed[source][self.layout.local(self.rank, piece)]
        self.link.exchange(send, step.send_to, receive, step.receive_from)

    def meet(self, step: Step) -> None:
        """Waits for all ranks."""
        self.link.meet()

    def pull(self, step: Step) -> None:
        """One piece of a peer's partial sums of the own rows, out of the peer's memory."""
        source, piece = step.chunk
        rows = self.layout.local(self.rank, piece)
        begin = self.layout.rows_of(self.rank, piece).start
        self.shared.pull(source, begin, self.landed[source][rows])

    def reduce(self, step: Step) -> None:
        """The rank-ordered sum of one piece of the own rows."""
        rows = self.layout.local(self.rank, step.chunk[1])
        self.reduce_rows(self.landed[:, rows], self.output[rows])

    def matmul_all(self, step: Step) -> None:
        """All partial sums, one matmul a rank: the shapes, and so the bits, of the overlapped path."""
        for rank in range(len(self.layout.rows)):
            rows = self.layout.rows_of(rank)
            self.multiply(self.rows[rows], self.partial[rows])

    def reduce_scatter_all(self, step: Step) -> None:
        """The plain collective, with the same sum in the same order."""
        self.link.all_to_all(self.landed, self.layout.rows, self.partial)
        self.reduce_rows(self.landed, self.output)
