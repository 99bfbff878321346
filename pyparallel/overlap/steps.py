"""Steps that several pipelines have in common."""

from __future__ import annotations

from pyparallel.overlap.schedule import COMMUNICATION, COMPUTE, Builder, Region, Step


def own_matmul(builder: Builder, *, action: str, own: str, output: str) -> Step:
    """The matmul of the rank's own shard, in one piece: its rows are all there from the start."""
    pieces = range(builder.pieces)
    return Step(
        name=f"{action}[{builder.rank},-1]",
        action=action,
        stream=builder.next_compute(),
        chunk=(builder.rank, -1),
        reads=tuple((own, p) for p in pieces),
        writes=tuple((output, builder.rank, p) for p in pieces),
    )


def chunk_matmul(
    builder: Builder, *, chunk: tuple[int, int], region: Region, name: str, output: str
) -> Step:
    """The matmul of one foreign chunk, after the event of its landing."""
    return Step(
        name=f"matmul[{chunk[0]},{chunk[1]}]",
        action="matmul",
        stream=builder.next_compute(),
        chunk=chunk,
        waits=(f"{name}[{chunk[0]},{chunk[1]}]",),
        reads=(region,),
        writes=((output, *chunk),),
    )


def add_own_copy(builder: Builder, *, own: str, landing: str) -> str:
    """Copies the own shard beside the foreign ones, for a matmul that reads all rows as one matrix."""
    pieces = range(builder.pieces)
    return builder.add(
        Step(
            name="copy_own",
            action="copy_own",
            stream=COMMUNICATION,
            chunk=(builder.rank, -1),
            reads=tuple((own, p) for p in pieces),
            writes=tuple((landing, builder.rank, p) for p in pieces),
        )
    )


def chunk_regions(builder: Builder, buffer: str) -> tuple[Region, ...]:
    """Every (rank, piece) region of a buffer that holds all ranks' rows."""
    return tuple((buffer, q, p) for q in range(builder.size) for p in range(max(builder.pieces, 1)))


def add_gather_all(builder: Builder, *, own: str) -> str:
    """The plain all-gather of a path that is not overlapped."""
    return builder.add(
        Step(
            name="gather_all",
            action="gather_all",
            stream=COMMUNICATION,
            reads=((own, 0),),
            writes=chunk_regions(builder, "gathered"),
        )
    )


def add_matmul_all(builder: Builder, *, rows: str, output: str, waits: tuple[str, ...] = ()) -> str:
    """One matmul over the rows of all ranks."""
    return builder.add(
        Step(
            name="matmul_all",
            action="matmul_all",
            stream=COMPUTE[0],
            waits=waits,
            reads=chunk_regions(builder, rows),
            writes=chunk_regions(builder, output),
        )
    )


def add_reduce_scatter_all(builder: Builder, *, output: str) -> str:
    """The plain reduce-scatter of a path that is not overlapped."""
    return builder.add(
        Step(
            name="reduce_scatter_all",
            action="reduce_scatter_all",
            stream=COMMUNICATION,
            waits=("matmul_all",),
            reads=chunk_regions(builder, "partial"),
            writes=((output, 0),),
        )
    )


def add_weight_gradient(
    builder: Builder, *, left: str, right: str, waits: tuple[str, ...], stream: str
) -> str:
    """dW = left^T @ right over the rows of all ranks: one matmul, whatever the chunks were."""
    return builder.add(
        Step(
            name="weight_gradient",
            action="weight_gradient",
            stream=stream,
            waits=waits,
            reads=(*chunk_regions(builder, left), *chunk_regions(builder, right)),
            writes=(("dw",),),
        )
    )
