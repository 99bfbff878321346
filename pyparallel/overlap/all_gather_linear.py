"""Schedules of Y = all_gather(X) @ W^T and of its backward.

X_r [M_r, K] rows of rank r, W [N, K], Y [M, N] with M = sum of M_r:

    forward   Y = all_gather(X) @ W^T
    dgrad     dX = reduce_scatter(dY @ W)
    wgrad     dW = dY^T @ all_gather(X)
"""

from __future__ import annotations

from pyparallel.overlap.gather import add_exchanges, check_slots, check_transport
from pyparallel.overlap.scatter import add_reduce_scatter
from pyparallel.overlap.schedule import COMPUTE, Builder, Schedule
from pyparallel.overlap.steps import (
    add_gather_all,
    add_matmul_all,
    add_own_copy,
    add_reduce_scatter_all,
    add_weight_gradient,
    chunk_matmul,
    chunk_regions,
    own_matmul,
)


def all_gather_linear(
    *, rank: int, size: int, pieces: int, transport: str = "direct", slots: int | None = None
) -> Schedule:
    """Forward schedule: own chunk at once, then chunk by chunk as they land.

    pieces: C, pieces per shard; 0 gathers everything and then runs one matmul.
    slots: landing places reused in turn (memory slots / ((R - 1) C) of the gathered input); None
    keeps every chunk.
    """
    builder = Builder(operation="all_gather_linear", rank=rank, size=size, pieces=pieces)
    check_transport(transport)
    if pieces == 0:
        gathered = add_gather_all(builder, own="x")
        add_matmul_all(builder, rows="gathered", output="y", waits=(gathered,))
        return builder.finish(inputs=(("x", 0),), outputs=chunk_regions(builder, "y"))
    check_slots(slots, pieces=pieces, transport=transport)
    builder.add(own_matmul(builder, action="matmul", own="x", output="y"))
    place = add_exchanges(
        builder,
        name="gather",
        own="x",
        landing="landing",
        transport=transport,
        slots=slots,
        reader="matmul",
    )
    for chunk, region in place.items():
        builder.add(chunk_matmul(builder, chunk=chunk, region=region, name="gather", output="y"))
    return builder.finish(
        inputs=tuple(("x", p) for p in range(pieces)), outputs=chunk_regions(builder, "y")
    )


def all_gather_linear_backward(
    *, rank: int, size: int, pieces: int, transport: str = "direct"
) -> Schedule:
    """Backward schedule: X is gathered again under dgrad, and dX travels under wgrad."""
    builder = Builder(operation="all_gather_linear_backward", rank=rank, size=size, pieces=pieces)
    check_transport(transport)
    rows = chunk_regions(builder, "dy")
    if pieces == 0:
        gathered = add_gather_all(builder, own="x")
        add_matmul_all(builder, rows="dy", output="partial")
        add_weight_gradient(
            builder, left="dy", right="gathered", waits=(gathered,), stream=COMPUTE[0]
        )
        add_reduce_scatter_all(builder, output="dx")
        return builder.finish(inputs=(("x", 0), *rows), outputs=(("dw",), ("dx", 0)))
    copied = add_own_copy(builder, own="x", landing="gathered")
    place = add_exchanges(
        builder,
        name="gather",
        own="x",
        landing="gathered",
        transport=transport,
        meet_after=False,
    )
    # What is summed at its owner is never forwarded.
    reduces = add_reduce_scatter(
        builder,
        rows="dy",
        partial="partial",
        output="dx",
        transport="copy" if transport == "copy" else "direct",
    )
    landed = tuple(f"gather[{q},{p}]" for q, p in list(place)[-1:])
    add_weight_gradient(
        builder,
        left="dy",
        right="gathered",
        waits=(copied, *landed),
        stream=builder.next_compute(),
    )
    for step in reduces:
        builder.add(step)
    return builder.finish(
        inputs=(*(("x", p) for p in range(pieces)), *rows),
        outputs=(("dw",), *(("dx", p) for p in range(pieces))),
    )
