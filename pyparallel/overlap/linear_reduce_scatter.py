"""Schedules of Y = reduce_scatter(X @ W^T) and of its backward.

X [M, K_r], W [N, K_r] with K split over the ranks, Y_r [M_r, N] rows of rank r:

    forward   Y = reduce_scatter(X @ W^T)
    dgrad     dX = all_gather(dY) @ W
    wgrad     dW = all_gather(dY)^T @ X

Forward works out the rows of remote ranks first and its own last, so that what is sent has the longest
time to travel.
"""

from __future__ import annotations

from pyparallel.overlap.gather import SCATTER_TRANSPORTS, add_exchanges, check_transport
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


def linear_reduce_scatter(
    *, rank: int, size: int, pieces: int, transport: str = "direct"
) -> Schedule:
    """Forward schedule. pieces: C, pieces per destination; 0 runs one matmul, then one reduction.

    transport: `direct` or `copy`; partial sums are added where they belong, so no ring carries them.
    """
    builder = Builder(operation="linear_reduce_scatter", rank=rank, size=size, pieces=pieces)
    check_transport(transport, SCATTER_TRANSPORTS)
    rows = chunk_regions(builder, "x")
    if pieces == 0:
        add_matmul_all(builder, rows="x", output="partial")
        add_reduce_scatter_all(builder, output="y")
        return builder.finish(inputs=rows, outputs=(("y", 0),))
    reduces = add_reduce_scatter(
        builder, rows="x", partial="partial", output="y", transport=transport
    )
    for step in reduces:
        builder.add(step)
    return builder.finish(inputs=rows, outputs=tuple(("y", p) for p in range(pieces)))


def linear_reduce_scatter_backward(
    *, rank: int, size: int, pieces: int, transport: str = "direct"
) -> Schedule:
    """Backward schedule: dgrad of each chunk of dY as it lands, then wgrad over all rows."""
    builder = Builder(
        operation="linear_reduce_scatter_backward", rank=rank, size=size, pieces=pieces
    )
    check_transport(transport)
    rows = chunk_regions(builder, "x")
    outputs = (("dw",), *chunk_regions(builder, "dx"))
    if pieces == 0:
        gathered = add_gather_all(builder, own="dy")
        add_matmul_all(builder, rows="gathered", output="dx", waits=(gathered,))
        add_weight_gradient(builder, left="gathered", right="x", waits=(), stream=COMPUTE[0])
        return builder.finish(inputs=(("dy", 0), *rows), outputs=outputs)
    builder.add(own_matmul(builder, action="matmul", own="dy", output="dx"))
    copied = add_own_copy(builder, own="dy", landing="gathered")
    place = add_exchanges(builder, name="gather", own="dy", landing="gathered", transport=transport)
    for chunk, region in place.items():
        builder.add(chunk_matmul(builder, chunk=chunk, region=region, name="gather", output="dx"))
    landed = tuple(f"gather[{q},{p}]" for q, p in list(place)[-1:])
    add_weight_gradient(
        builder,
        left="gathered",
        right="x",
        waits=(copied, *landed),
        stream=builder.next_compute(),
    )
    return builder.finish(inputs=(*(("dy", p) for p in range(pieces)), *rows), outputs=outputs)
