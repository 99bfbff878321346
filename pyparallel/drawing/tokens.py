"""Who holds which tokens: between the matmuls with sequence parallelism, and along cp."""

from __future__ import annotations

from pyparallel.comm.context import zigzag_parts
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.cut.shard import Range
from pyparallel.drawing.svg import MARGIN, WIDTH, Block, clipped, colour, rect, text

LEFT = 200


def tokens_block(
    tokens: int, group: Group, context: int, *, sequence_parallel: bool
) -> Block | None:
    """Bars of one sequence; None where every rank has all of it everywhere.

    Args:
        group: the tensor-parallel ranks.
        context: ranks along cp, which hold two chunks each, an early and a late one.
    """
    shapes = [text(MARGIN, 12, "Tokens", style="head")]
    y = 24.0
    own = tokens
    if context > 1:
        sharding = zigzag_parts(tokens, context)
        held = [(piece, rank) for rank, ranges in enumerate(sharding.ranges) for piece in ranges]
        shapes += _bar("over cp ranks, zigzag", held, tokens, y, "cp")
        y += 34
        own = sharding.sizes[0]
    if sequence_parallel and group.size > 1:
        sizes = sequence_sizes(own, group)
        starts = [sum(sizes[:rank]) for rank in range(group.size)]
        parts = [((a, a + size), r) for r, (a, size) in enumerate(zip(starts, sizes, strict=True))]
        shapes += _bar("norms, residuals: tp ranks", parts, own, y, "sp")
        y += 34
        shapes.append(text(MARGIN, y + 15, "attention and MLP"))
        shapes.append(rect(LEFT, y, WIDTH - LEFT - MARGIN, 22, style="box"))
        words = f"all {own} tokens on every rank of tp, of its heads and features"
        shapes.append(text(LEFT + 8, y + 15, words, style="on"))
        y += 34
    return Block(y, tuple(shapes)) if y > 24 else None


def _bar(name: str, held: list[tuple[Range, int]], tokens: int, y: float, axis: str) -> list[str]:
    scale = (WIDTH - LEFT - MARGIN) / tokens
    shapes = [text(MARGIN, y + 15, name)]
    for (start, stop), rank in sorted(held):
        x, width = LEFT + start * scale, (stop - start) * scale
        tip = f"tokens {start} to {stop} on rank {rank} of {axis}"
        data = f"{axis} {start}-{stop}/{rank}"
        shapes.append(rect(x, y, width, 22, fill=colour(rank), tip=tip, data=data))
        words = clipped(f"{rank}: {stop - start}", width) or clipped(str(rank), width)
        shapes.append(text(x + width / 2, y + 15, words, style="on", anchor="middle"))
    return [*shapes, rect(LEFT, y, WIDTH - LEFT - MARGIN, 22, style="frame")]
