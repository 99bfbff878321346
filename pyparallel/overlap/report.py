"""The figures of docs/overlap.md: `python -m pyparallel.overlap.report docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from pyparallel.overlap.plot import curves_svg, timeline_svg
from pyparallel.overlap.predict import CANDIDATES, choose_pieces, predict, timeline
from pyparallel.overlap.timing import H100

# Llama-3-70B's MLP on 8 GPUs: K = 8192 into N = 28672 / 8 columns, and back.
SIZE = 8
SHAPES = {
    "all_gather_linear": (8192, 28672 // SIZE),
    "linear_reduce_scatter": (28672 // SIZE, 8192),
}
ROWS = (1024, 2048, 4096, 8192, 16384)
DRAWN_ROWS = 8192
COLORS = {"all_gather_linear": "#3b6ea8", "linear_reduce_scatter": "#5a9367"}
# Published by others: the share of communication hidden in tensor-parallel linear layers.
FLUX = (0.95, 0.97)
SYMMETRIC_MEMORY = ((4096, 0.44), (16384, 0.80))


def table() -> str:
    """Markdown: every operation and M, with the choice of pieces and what stays exposed."""
    lines = [
        "| operation | M | pieces | matmul us | communication us | plain us | overlapped us "
        "| exposed us | hidden |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for operation, (k, n) in SHAPES.items():
        for m in ROWS:
            pieces = choose_pieces(operation, m=m, k=k, n=n, size=SIZE)
            p = predict(operation, m=m, k=k, n=n, size=SIZE, pieces=pieces)
            times = (p.matmul, p.communication, p.plain, p.total, p.exposed)
            cells = " | ".join(f"{t * 1e6:.0f}" for t in times)
            lines.append(f"| `{operation}` | {m} | {pieces} | {cells} | {p.hidden:.0%} |")
    return "\n".join(lines)


def pieces_table() -> str:
    """Markdown: total time of every candidate number of pieces."""
    heads = " | ".join(f"{c} pieces" if c else "plain" for c in CANDIDATES)
    lines = [f"| operation | M | {heads} |", "| --- | --: |" + " --: |" * len(CANDIDATES)]
    for operation, (k, n) in SHAPES.items():
        for m in ROWS:
            totals = (
                predict(operation, m=m, k=k, n=n, size=SIZE, pieces=c).total for c in CANDIDATES
            )
            lines.append(
                f"| `{operation}` | {m} | " + " | ".join(f"{t * 1e6:.0f}" for t in totals) + " |"
            )
    return "\n".join(lines)


def write_plots(folder: Path) -> None:
    """overlap_<operation>.svg (timelines of rank 0) and overlap_hidden.svg (curves)."""
    folder.mkdir(parents=True, exist_ok=True)
    for operation, (k, n) in SHAPES.items():
        shape = {"m": DRAWN_ROWS, "k": k, "n": n, "size": SIZE}
        pieces = choose_pieces(operation, **shape)
        drawn = [
            ("not overlapped", timeline(operation, **shape, pieces=0)),
            (f"{pieces} piece(s) a shard", timeline(operation, **shape, pieces=pieces)),
        ]
        (folder / f"overlap_{operation}.svg").write_text(timeline_svg(drawn))
    series = []
    for operation, (k, n) in SHAPES.items():
        points = []
        for m in ROWS:
            pieces = choose_pieces(operation, m=m, k=k, n=n, size=SIZE)
            points.append((m, predict(operation, m=m, k=k, n=n, size=SIZE, pieces=pieces).hidden))
        series.append((f"{operation} (model)", COLORS[operation], points))
    series.append(("symmetric memory (publ.)", "#d98c3f", SYMMETRIC_MEMORY))
    series.append(("Flux (published)", "#b04a5a", [(m, sum(FLUX) / 2) for m in ROWS]))
    curves = curves_svg(series, title="Communication hidden under the matmul", x_label="M (tokens)")
    (folder / "overlap_hidden.svg").write_text(curves)


def main() -> int:
    """Writes the plots beside the page and prints the tables that it quotes."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs")
    write_plots(folder)
    print(f"{H100.name}: {H100.peak / 1e12:.0f} TFLOP/s x {H100.efficiency:.0%}, ", end="")
    print(f"{H100.link / 1e9:.0f} GB/s a GPU each way, tp {SIZE}\n")
    print(table(), pieces_table(), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
