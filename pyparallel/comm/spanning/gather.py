"""How what ranks have comes to all ranks of several machines, without a sum.

Every rank sends its part once to each other machine, whose ranks take the parts in by turns and show
them to one another: each link carries a byte once in each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import Tensor

from pyparallel.comm.spanning.desk import GOT, PUT_IN
from pyparallel.comm.spanning.machines import SPREAD, Machines
from pyparallel.comm.spanning.ticks import Slice, ticks

# Stages between asking for a piece and waiting for it: so many rounds are on their way at once.
ON_THE_WAY = 2


def gathered(over: Machines, pieces: Sequence[Tensor], number: int) -> Slice:
    """A piece of every rank to all ranks; ``pieces[r]`` is rank r's, filled on rank r.

    Args:
        number: of the round; who takes whose piece in changes with it.
    """
    desk, me, pending = over.desk, over.inside.rank, over.pending()
    local = over.ranks[over.index]
    own = pieces[local[me]]
    taken = _taken(over, pieces, number)
    arrivals: list[Callable[[], None]] = []
    for rank, taker, _ in taken:
        if taker == me:
            arrivals.append(over.between.start_recv(pieces[rank], rank, SPREAD))
    for machine, ranks in enumerate(over.ranks):
        if machine != over.index and own.numel():
            taker = ranks[(local[me] + number) % len(ranks)]
            pending.waits.append(over.between.start_send(own, taker, SPREAD))
    desk.show(PUT_IN, own)
    yield
    for rank in local:
        if rank != local[me] and pieces[rank].numel():
            pieces[rank].copy_(desk.read(PUT_IN, over.local(rank), pieces[rank]))
    yield from ticks(ON_THE_WAY)
    for wait in arrivals:
        wait()
    for rank, taker, start in taken:
        desk.show(GOT, pieces[rank] if taker == me else own[:0], start)
    yield
    for rank, taker, start in taken:
        if taker != me:
            pieces[rank].copy_(desk.read(GOT, taker, pieces[rank], start))
    pending.settle()


def _taken(over: Machines, pieces: Sequence[Tensor], number: int) -> list[tuple[int, int, int]]:
    """The other machines' ranks, who of this machine takes their piece in, and its place with him."""
    filled = [0] * over.inside.size
    found = []
    for rank, piece in enumerate(pieces):
        if rank not in over.ranks[over.index] and piece.numel():
            taker = (rank + number) % over.inside.size
            found.append((rank, taker, filled[taker]))
            filled[taker] += piece.numel()
    return found


def gather_short(over: Machines, output: Tensor, input: Tensor, counts: Sequence[int]) -> None:
    """``output`` = the inputs of all ranks: one message from machine to machine, at once."""
    ends = list(accumulate(counts, initial=0))
    blocks = [output[ends[ranks[0]] : ends[ranks[-1] + 1]] for ranks in over.ranks]
    own = blocks[over.index]
    over.inside.all_gather(own, input, counts=[counts[rank] for rank in over.ranks[over.index]])
    if over.inside.rank == 0:
        leaders = [
            (ranks[0], block)
            for machine, (ranks, block) in enumerate(zip(over.ranks, blocks, strict=True))
            if machine != over.index
        ]
        waits = [over.between.start_recv(b, rank, SPREAD) for rank, b in leaders if b.numel()]
        if own.numel():
            waits += [over.between.start_send(own, rank, SPREAD) for rank, _ in leaders]
        for wait in waits:
            wait()
    over.inside.broadcast(output, 0)


def broadcast_short(over: Machines, data: Tensor, src: int, root: int) -> None:
    """``data`` = rank ``src``'s, who is on machine ``root``: one message to each other machine."""
    if over.index != root:
        if over.inside.rank == 0:
            over.between.start_recv(data, src, SPREAD)()
        over.inside.broadcast(data, 0)
        return
    local = over.ranks[root]
    waits = []
    if src == local[over.inside.rank]:
        leaders = [ranks[0] for ranks in over.ranks if src not in ranks]
        waits = [over.between.start_send(data, leader, SPREAD) for leader in leaders]
    over.inside.broadcast(data, over.local(src))
    for wait in waits:
        wait()
