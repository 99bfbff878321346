"""Attention along cp, both ways: whose keys each rank meets at each step of the ring, and what Ulysses
exchanges.

Read from what runs: the blocks that the ring plans, its order of visits, and Ulysses' layout of heads.
"""

from __future__ import annotations

from pyparallel.comm.context import zigzag_parts
from pyparallel.cut.attention_blocks import Block as Pairs
from pyparallel.cut.attention_blocks import plan_blocks
from pyparallel.cut.shard import Range, Sharding
from pyparallel.drawing.svg import (
    MARGIN,
    WIDTH,
    Block,
    arrow,
    clipped,
    colour,
    human_bytes,
    paler,
    rect,
    text,
)
from pyparallel.ops.context.ring import visits
from pyparallel.ops.context.ulysses import head_layout

LEFT, ROW = 200, 22


def context_attention_block(
    tokens: int, context: int, heads: int, kv_heads: int, head_dim: int, itemsize: int
) -> Block | None:
    """Both algorithms of one layer's causal attention; None where one rank has all tokens.

    Args:
        tokens: of a sequence, over ``context`` ranks.
        heads, kv_heads: of one tp rank.
    """
    if context == 1:
        return None
    sharding = zigzag_parts(tokens, context)
    ring, height = _ring(sharding, context, 2 * kv_heads * head_dim * itemsize)
    ulysses, more = _ulysses(sharding, context, heads, kv_heads, height + 14)
    title = text(MARGIN, 12, "Causal attention along cp", style="head")
    return Block(more, (title, *ring, *ulysses))


def _ring(sharding: Sharding, context: int, token_bytes: int) -> tuple[list[str], float]:
    """A column a step: which rank's keys each rank's queries meet, and how many pairs that is."""
    sent = human_bytes(max(sharding.sizes) * token_bytes)
    words = "ring: at each step a rank works on one rank's keys while the next ones come"
    words += f" ({sent} a step)"
    shapes = [text(MARGIN, 30, words, style="note")]
    width = (WIDTH - LEFT - MARGIN) / context
    y = 38.0
    for rank in range(context):
        shapes.append(text(MARGIN, y + 15, clipped(f"queries of rank {rank}", LEFT - MARGIN)))
        for step, visited in enumerate(visits(rank, context)):
            blocks = plan_blocks(sharding.ranges[rank], sharding.ranges[visited], causal=True)
            pairs = sum(_count(block) for block in blocks)
            whole = sharding.sizes[rank] * sharding.sizes[visited]
            x = LEFT + step * width
            tip = f"step {step}: rank {rank}'s queries, rank {visited}'s keys: {pairs} of {whole} pairs"
            data = f"ring {rank}.{step}/{visited}={pairs}"
            fill = paler(colour(visited), 1 - 2 * min(0.5, pairs / whole))
            shapes.append(rect(x, y, width - 2, ROW - 2, fill=fill, tip=tip, data=data))
            said = clipped(f"{visited}: {100 * pairs / whole:.0f} %", width) or clipped(
                str(visited), width
            )
            shapes.append(text(x + width / 2, y + 14, said, style="on", anchor="middle"))
        y += ROW
    return shapes, y


def _count(block: Pairs) -> int:
    """Pairs of a query and a key that it sees, without a window."""
    queries, keys = (stop - start for start, stop in (block.q, block.k))
    return queries * (queries + 1) // 2 if block.causal else queries * keys


def _ulysses(
    sharding: Sharding, context: int, heads: int, kv_heads: int, top: float
) -> tuple[list[str], float]:
    """Tokens down, heads across: before the exchange and after it."""
    try:
        layout = head_layout(heads, kv_heads, context)
    except ValueError as error:
        return [text(MARGIN, top + 12, str(error), style="note")], top + 18
    words = "ulysses: an all-to-all gives a rank all tokens of some heads, another one its tokens of all"
    shapes = [text(MARGIN, top + 12, words, style="note")]
    y, height, width = top + 20, 110.0, 300.0
    tokens = sum(sharding.sizes)
    for rank, ranges in enumerate(sharding.ranges):
        for start, stop in ranges:
            box = (LEFT, y + height * start / tokens, width, height * (stop - start) / tokens)
            shapes += _held(
                box, rank, f"tokens {start} to {stop}, all {heads} heads", (start, stop)
            )
    right = LEFT + width + 120
    for rank, (start, stop) in enumerate(layout.query):
        box = (right + width * start / heads, y, width * (stop - start) / heads, height)
        kept = "KV head" if layout.kv[rank][1] - layout.kv[rank][0] == 1 else "KV heads"
        first, last = layout.kv[rank]
        tip = f"all tokens of query heads {start} to {stop}, {kept} {first} to {last}"
        shapes += _held(box, rank, tip, (start, stop))
    shapes.append(arrow(LEFT + width + 14, y + height / 2 - 10, right - 14, y + height / 2 - 10))
    shapes.append(arrow(right - 14, y + height / 2 + 10, LEFT + width + 14, y + height / 2 + 10))
    middle = (LEFT + width + right) / 2
    shapes.append(text(middle, y + height / 2 - 18, "q, k, v", style="note", anchor="middle"))
    shapes.append(text(middle, y + height / 2 + 28, "o", style="note", anchor="middle"))
    shapes.append(text(MARGIN, y + height / 2 + 4, "tokens down, heads across"))
    return shapes, y + height + 6


def _held(box: tuple[float, float, float, float], rank: int, tip: str, piece: Range) -> list[str]:
    x, y, width, height = box
    data = f"ulysses {piece[0]}-{piece[1]}/{rank}"
    shapes = [rect(x, y, width, height, fill=colour(rank), tip=f"rank {rank}: {tip}", data=data)]
    if height >= 12:
        shapes.append(
            text(
                x + width / 2,
                y + height / 2 + 4,
                clipped(str(rank), width),
                style="on",
                anchor="middle",
            )
        )
    return shapes
