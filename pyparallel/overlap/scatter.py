"""The reduce-scatter of partial sums under the matmuls that make them, shared by the pipelines.

Rank r computes the rows of rank (r + s) % R in round s = 1..R-1 and sends them there, while the partial
sums of rank (r - s) % R for r's own rows arrive: one exchange a piece, (R - 1) * C steps, (R - 1) / R of
the partial bytes through every rank's link. The own rows come last and stay. Partials of source q land
in slot q, and the sum over the slots runs in rank order.
"""

from __future__ import annotations

from pyparallel.overlap.schedule import COMMUNICATION, COMPUTE, Builder, Step


def add_reduce_scatter(builder: Builder, *, rows: str, partial: str, output: str) -> list[Step]:
    """Adds matmuls (remote rows first, own last) and the exchanges of their partial sums.

    Returns the reductions, one a piece, for the caller to place: work that needs no communication
    belongs before them.
    """
    rank, size, pieces = builder.rank, builder.size, builder.pieces
    for s in range(1, size):
        target, source = (rank + s) % size, (rank - s) % size
        for piece in range(pieces):
            computed = builder.add(
                Step(
                    name=f"partial[{target},{piece}]",
                    action="partial",
                    stream=builder.next_compute(),
                    chunk=(target, piece),
                    reads=((rows, target, piece),),
                    writes=((partial, target, piece),),
                )
            )
            builder.add(
                Step(
                    name=f"scatter[{source},{piece}]",
                    action="scatter",
                    stream=COMMUNICATION,
                    chunk=(source, piece),
                    waits=(computed,),
                    send_to=target,
                    receive_from=source,
                    send_chunk=(target, piece),
                    receive_chunk=(source, piece),
                    reads=((partial, target, piece),),
                    writes=(("landed", source, piece),),
                )
            )
    own = builder.add(
        Step(
            name=f"partial[{rank},-1]",
            action="partial",
            stream=builder.next_compute(),
            chunk=(rank, -1),
            reads=tuple((rows, rank, p) for p in range(pieces)),
            writes=tuple(("landed", rank, p) for p in range(pieces)),
        )
    )
    last_source = (rank - (size - 1)) % size
    return [
        Step(
            name=f"reduce[{piece}]",
            action="reduce",
            stream=COMPUTE[piece % len(COMPUTE)],
            chunk=(rank, piece),
            waits=(own,) if size == 1 else (own, f"scatter[{last_source},{piece}]"),
            reads=tuple(("landed", q, piece) for q in range(size)),
            writes=((output, piece),),
        )
        for piece in range(pieces)
    ]
