"""The mesh: every rank of the job by its place along dp, pp, cp and tp."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from pyparallel.drawing.svg import MARGIN, WIDTH, Block, clipped, colour, rect, text
from pyparallel.mesh import AXES

# Rows of replicas that are drawn; more of them look alike.
MOST_REPLICAS = 4


def places_of(sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Each rank's place along the axes, as ``init_mesh`` lays them out: tp fastest, dp slowest."""
    return list(itertools.product(*(range(sizes[axis]) for axis in AXES)))


def ranks_block(sizes: Mapping[str, int]) -> Block:
    """A row for each replica and stage, a cell for each rank of cp x tp in it, coloured by tp."""
    dp, pp, cp, tp = (sizes[axis] for axis in AXES)
    shown = min(dp, MOST_REPLICAS)
    left = 130.0
    cell = min(46.0, (WIDTH - left - MARGIN - 8 * cp) / (cp * tp))
    height = 20.0 if pp * shown <= 16 else 12.0
    shapes = [
        text(MARGIN, 12, "Ranks", style="head"),
        text(
            MARGIN,
            28,
            f"{dp * pp * cp * tp} in all: dp {dp} x pp {pp} x cp {cp} x tp {tp}; neighbours along tp "
            f"talk most, and are neighbours in number",
            style="note",
        ),
    ]
    # dp is the slowest axis: the first replicas have the first numbers.
    for number, place in enumerate(places_of({**sizes, "dp": shown})):
        replica, stage, context, rank = place
        y = 38 + replica * (pp * (height + 2) + 8) + stage * (height + 2)
        x = left + context * (tp * cell + 8) + rank * cell
        tip = f"rank {number}: dp {replica}, pp {stage}, cp {context}, tp {rank}"
        data = f"rank {number}/{rank}"
        shapes.append(rect(x, y, cell - 1, height, fill=colour(rank), tip=tip, data=data))
        if height > 12 and (words := clipped(str(number), cell - 1, 6.5)):
            shapes.append(text(x + cell / 2, y + 14, words, style="on", anchor="middle"))
        if context == rank == 0:
            shapes.append(text(MARGIN, y + height - 4, f"dp {replica}, pp {stage}", style="note"))
    y = 38 + shown * (pp * (height + 2) + 8)
    if shown < dp:
        shapes.append(
            text(MARGIN, y + 8, f"and {dp - shown} more replicas like these", style="note")
        )
        y += 16
    return Block(y, tuple(shapes))
