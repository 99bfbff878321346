"""The reduce-scatter of partial sums under the matmuls that make them, shared by the pipelines.

Rank r computes the rows of rank (r + s) % R in round s = 1..R-1 and sends them there, while the partial
sums of rank (r - s) % R for r's own rows arrive: one exchange a piece, (R - 1) * C steps, (R - 1) / R of
the partial bytes through every rank's link. With the transport `copy` the ranks meet when they have
computed a piece, and each copies what is its out of its peer's memory (see `gather.py`). The own rows
come last and stay, in C pieces as well, so that the sum of one runs under the matmul of the next.
Partials of source q land in slot q, and the sum over the slots runs in rank order.
"""

from __future__ import annotations

from pyparallel.overlap.gather import meeting
from pyparallel.overlap.schedule import COMMUNICATION, Builder, Step


def add_reduce_scatter(
    builder: Builder, *, rows: str, partial: str, output: str, transport: str = "direct"
) -> list[Step]:
    """Adds matmuls (remote rows first, own last) and the transport of their partial sums.

    Returns the reductions, one a piece, for the caller to place: work that needs no communication
    belongs before them.
    """
    rank, size, pieces = builder.rank, builder.size, builder.pieces
    for s in range(1, size):
        target, source = (rank + s) % size, (rank - s) % size
        for piece in range(pieces):
            computed = builder.add(_partial(builder, rows, (target, piece), partial))
            chunks = (target, piece), (source, piece)
            if transport == "copy":
                builder.add(meeting(f"scatter_ready[{s},{piece}]", waits=(computed,)))
                builder.add(_pull(builder, partial, *chunks))
            else:
                builder.add(_exchange(partial, *chunks, computed))
    if transport == "copy":
        builder.add(meeting("scatter_taken"))
    own = [builder.add(_partial(builder, rows, (rank, p), "landed")) for p in range(pieces)]
    # On the stream that brought the others' partial sums, so it has come behind all of them.
    return [
        Step(
            name=f"reduce[{piece}]",
            action="reduce",
            stream=COMMUNICATION,
            chunk=(rank, piece),
            waits=(own[piece],),
            reads=tuple(("landed", q, piece) for q in range(size)),
            writes=((output, piece),),
        )
        for piece in range(pieces)
    ]


def _partial(builder: Builder, rows: str, chunk: tuple[int, int], output: str) -> Step:
    return Step(
        name=f"partial[{chunk[0]},{chunk[1]}]",
        action="partial",
        stream=builder.next_compute(),
        chunk=chunk,
        reads=((rows, *chunk),),
        writes=((output, *chunk),),
    )


def _pull(builder: Builder, partial: str, sent: tuple[int, int], landing: tuple[int, int]) -> Step:
    return Step(
        name=f"scatter[{landing[0]},{landing[1]}]",
        action="pull_partial",
        stream=COMMUNICATION,
        chunk=landing,
        pull_from=landing[0],
        remote_reads=((partial, builder.rank, sent[1]),),
        writes=(("landed", *landing),),
    )


def _exchange(partial: str, sent: tuple[int, int], landing: tuple[int, int], computed: str) -> Step:
    return Step(
        name=f"scatter[{landing[0]},{landing[1]}]",
        action="scatter",
        stream=COMMUNICATION,
        chunk=landing,
        waits=(computed,),
        send_to=sent[0],
        receive_from=landing[0],
        send_chunk=sent,
        receive_chunk=landing,
        reads=((partial, *sent),),
        writes=(("landed", *landing),),
    )
