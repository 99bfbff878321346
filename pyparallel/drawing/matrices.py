"""The matrices of one layer and both tables: what each tensor-parallel rank holds of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyparallel.cut.shard import HeadLayout
from pyparallel.drawing.cuts import MatrixCut
from pyparallel.drawing.svg import MARGIN, WIDTH, Block, clipped, colour, listed, rect, text

TALLEST, LEAST_ROOM = 220.0, 100.0


def matrices_block(matrices: Sequence[MatrixCut], ranks: int) -> Block:
    """Every matrix as its ranks' slices; sides go with the cube roots of their lengths."""
    columns = _columns(matrices)
    widest = max(matrix.columns for matrix in matrices) ** (1 / 3)
    tallest = max(sum(m.rows ** (1 / 3) for m in column) for column in columns)
    room = (WIDTH - 2 * MARGIN) / len(columns)
    scale = min((room - 12) / widest, TALLEST / tallest)
    shapes = [
        text(MARGIN, 12, "What each rank holds of each matrix", style="head"),
        text(
            MARGIN,
            28,
            "weights as [out, in]: column-parallel ones are cut across, row-parallel ones down; sides "
            "go with the cube roots of their lengths",
            style="note",
        ),
    ]
    lowest = 0.0
    for place, column in enumerate(columns):
        x, y = MARGIN + place * max(room, LEAST_ROOM), 44.0
        for matrix in column:
            height = matrix.rows ** (1 / 3) * scale
            shapes += _slices(matrix, x, y, matrix.columns ** (1 / 3) * scale, height)
            y += height + 4
        shapes.append(text(x, y + 12, ", ".join(matrix.name for matrix in column)))
        lengths = ", ".join(str(matrix.rows) for matrix in column)
        shapes.append(text(x, y + 26, f"{lengths} x {column[0].columns}", style="note"))
        lowest = max(lowest, y + 26)
    return Block(
        lowest + 20 + _legend_height(ranks), (*shapes, *_legend(matrices, ranks, lowest + 18))
    )


def _columns(matrices: Sequence[MatrixCut]) -> list[list[MatrixCut]]:
    """Matrices of attention's one projection above one another, all others side by side."""
    found: list[list[MatrixCut]] = []
    for matrix in matrices:
        if found and found[-1][0].module == matrix.module and "qkv" in matrix.module:
            found[-1].append(matrix)
        else:
            found.append([matrix])
    return found


def _slices(matrix: MatrixCut, x: float, y: float, width: float, height: float) -> list[str]:
    """The matrix as rectangles that tile it; a replicated slice is shared out among its holders."""
    length = matrix.rows if matrix.axis == 0 else matrix.columns
    shapes, labels = [], []
    for part in matrix.parts:
        begin, size = part.start / length, (part.stop - part.start) / length
        for place, rank in enumerate(part.ranks):
            share = 1 / len(part.ranks)
            if matrix.axis == 0:
                box = (x + width * place * share, y + height * begin, width * share, height * size)
            else:
                box = (x + width * begin, y + height * place * share, width * size, height * share)
            copies = f", a replica on ranks {listed(part.ranks)}" if len(part.ranks) > 1 else ""
            axis = "rows" if matrix.axis == 0 else "columns"
            tip = f"{matrix.name}: {axis} {part.start} to {part.stop} on rank {rank}{copies}"
            shapes.append(rect(*box, fill=colour(rank), tip=tip, data=f"{matrix.name}/{rank}"))
            words = clipped(str(rank), box[2], 8) if box[3] >= 12 else ""
            middle = box[0] + box[2] / 2, box[1] + box[3] / 2 + 4
            labels.append((words, text(*middle, words, style="on", anchor="middle")))
    # All of a matrix's numbers or none.
    if all(words for words, _ in labels):
        shapes += [label for _, label in labels]
    return [*shapes, rect(x, y, width, height, style="frame")]


def _legend_height(ranks: int) -> float:
    return 22 + 20 * -(-ranks // 4)


def _legend(matrices: Sequence[MatrixCut], ranks: int, y: float) -> list[str]:
    """Each rank's colour, and how much of the layer it holds."""
    layer = [matrix for matrix in matrices if matrix.module.startswith("layers.")]
    whole = sum(matrix.numbers for matrix in layer)
    shapes = [text(MARGIN, y + 10, "tensor-parallel ranks, and their part of one layer:")]
    for rank in range(ranks):
        held = sum(matrix.held(rank) for matrix in layer)
        x, line = MARGIN + 240 * (rank % 4), y + 22 + 20 * (rank // 4)
        shapes.append(rect(x, line, 14, 14, fill=colour(rank)))
        words = f"rank {rank}: {held / 1e6:.4g} M numbers, {100 * held / whole:.1f} %"
        shapes.append(text(x + 20, line + 11, words, style="note"))
    return shapes


def heads_block(layout: HeadLayout) -> Block:
    """Query heads above the KV heads that they read; a replicated one has all its ranks' colours."""
    group = layout.num_heads // layout.num_kv_heads
    room = WIDTH - 2 * MARGIN
    # As many lines as keep a head seven pixels wide.
    lines = max(1, math.ceil(layout.num_heads * 7 / room))
    per_line = math.ceil(layout.num_kv_heads / lines)
    size = min(24.0, (room - 5 * per_line) / (per_line * group))
    owner = [
        next(r for r, (a, b) in enumerate(layout.query) if a <= head < b)
        for head in range(layout.num_heads)
    ]
    shapes = [
        text(MARGIN, 12, "Heads", style="head"),
        text(
            MARGIN,
            28,
            f"{layout.num_heads} query heads over the {layout.num_kv_heads} KV heads that they read"
            + (", some of which are replicated" if layout.replicated else ""),
            style="note",
        ),
    ]
    height = 2 * min(size, 18.0) + 12
    for kv in range(layout.num_kv_heads):
        x = MARGIN + (kv % per_line) * (group * size + 5)
        y = 40 + (kv // per_line) * height
        for head in range(kv * group, (kv + 1) * group):
            place = x + (head - kv * group) * size
            tip = f"query head {head} on rank {owner[head]}"
            fill = colour(owner[head])
            box = (place, y, max(size - 1, 1.0), min(size, 18.0))
            shapes.append(rect(*box, fill=fill, tip=tip, data=f"query {head}/{owner[head]}"))
        holders = [rank for rank, (a, b) in enumerate(layout.kv) if a <= kv < b]
        width = (group * size - 1) / len(holders)
        for place, rank in enumerate(holders):
            tip = f"KV head {kv} on {'ranks' if len(holders) > 1 else 'rank'} {listed(holders)}"
            box = (x + place * width, y + min(size, 18.0) + 2, width, min(size, 18.0) * 0.7)
            shapes.append(rect(*box, fill=colour(rank), tip=tip, data=f"kv {kv}/{rank}"))
    return Block(40 + math.ceil(layout.num_kv_heads / per_line) * height, tuple(shapes))
