"""The figures of docs/overlap.md, and the same for other speeds and shapes.

python -m bench.overlap.report --out docs
python -m bench.overlap.report --tflops 312 --link 300 --hidden 4096 --features 11008 --ranks 4
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.overlap.plot import curves_svg, timeline_svg
from pyparallel.overlap.choice import PIECES, choices, choose
from pyparallel.overlap.machine import H100, Machine
from pyparallel.overlap.predict import predict, predict_fused, timeline

# Llama-3-70B's MLP on 8 GPUs.
SIZE, HIDDEN, FEATURES = 8, 8192, 28672
ROWS = (1024, 2048, 4096, 8192, 16384)
DRAWN_ROWS = 8192
COLORS = {
    ("all_gather_linear", "direct"): "#9bb8d6",
    ("all_gather_linear", "copy"): "#3b6ea8",
    ("linear_reduce_scatter", "direct"): "#aacbb2",
    ("linear_reduce_scatter", "copy"): "#5a9367",
}
# Published by others: the share of communication hidden in tensor-parallel linear layers.
FLUX = (0.95, 0.97)
SYMMETRIC_MEMORY = ((4096, 0.44), (16384, 0.80))


def shapes_of(hidden: int, features: int, size: int) -> dict[str, tuple[int, int]]:
    """K and N of a rank's two matmuls of an MLP whose features are cut over the ranks."""
    share = -(-features // size)
    return {"all_gather_linear": (hidden, share), "linear_reduce_scatter": (share, hidden)}


def table(
    shapes: Mapping[str, tuple[int, int]], rows: Sequence[int], size: int, machine: Machine
) -> str:
    """Markdown: every operation, transport and M, with the library's matmul: what stays exposed."""
    lines = [
        "| operation | M | matmul us | communication us | plain us | over NCCL us | exposed us "
        "| hidden | by copies us | exposed us | hidden |",
        "| --- |" + " --: |" * 10,
    ]
    for operation, (k, n) in shapes.items():
        for m in rows:
            shape = {"m": m, "k": k, "n": n, "size": size, "machine": machine}
            cells = []
            for transport in ("direct", "copy"):
                choice = choose(operation, **shape, among=choices(transports=(transport,)))
                p = predict(operation, **shape, pieces=choice.pieces, transport=choice.transport)
                if not cells:
                    cells += [f"{round(t * 1e6)}" for t in (p.matmul, p.communication, p.plain)]
                cells += [f"{round(p.total * 1e6)}", f"{round(p.exposed * 1e6)}", f"{p.hidden:.0%}"]
            lines.append(f"| `{operation}` | {m} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pieces_table(
    shapes: Mapping[str, tuple[int, int]], rows: Sequence[int], size: int, machine: Machine
) -> str:
    """Markdown: total time of every number of pieces over both transports."""
    ways = [(p, t) for t in ("direct", "copy") for p in PIECES if p]
    names = {"direct": "NCCL", "copy": "copies"}
    heads = " | ".join(f"{names[t]}, {p}" for p, t in ways)
    lines = [f"| operation | M | plain | {heads} |", "| --- |" + " --: |" * (2 + len(ways))]
    for operation, (k, n) in shapes.items():
        for m in rows:
            shape = {"m": m, "k": k, "n": n, "size": size, "machine": machine}
            totals = [
                predict(operation, **shape, pieces=p, transport=t).total
                for p, t in ((0, "direct"), *ways)
            ]
            cells = " | ".join(f"{t * 1e6:.0f}" for t in totals)
            lines.append(f"| `{operation}` | {m} | {cells} |")
    return "\n".join(lines)


def fused_table(k: int, n: int, rows: Sequence[int], size: int, machine: Machine) -> str:
    """Markdown: the kernel that gathers while it multiplies, with copying blocks and without."""
    lines = [
        "| M | matmul us | 16 SMs copy: us | exposed us | hidden | copy engines: us | exposed us "
        "| hidden |",
        "|" + " --: |" * 8,
    ]
    for m in rows:
        shape = {"m": m, "k": k, "n": n, "size": size, "machine": machine}
        cells = []
        for copying_sms in (16, 0):
            p = predict_fused(**shape, copying_sms=copying_sms)
            cells += [] if cells else [f"{p.matmul * 1e6:.0f}"]
            cells += [f"{round(p.total * 1e6)}", f"{round(p.exposed * 1e6)}", f"{p.hidden:.0%}"]
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_plots(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    size: int,
    machine: Machine,
) -> None:
    """overlap_<operation>.svg (timelines of rank 0 at one M) and overlap_hidden.svg (curves)."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn_rows = DRAWN_ROWS if DRAWN_ROWS in rows else max(rows)
    series = []
    for operation, (k, n) in shapes.items():
        shape = {"k": k, "n": n, "size": size, "machine": machine}
        drawn = [
            (title, timeline(operation, m=drawn_rows, **shape, pieces=pieces, transport=transport))
            for title, pieces, transport in (
                ("not overlapped", 0, "direct"),
                ("over NCCL", 1, "direct"),
                ("by copy engines", 1, "copy"),
            )
        ]
        (folder / f"overlap_{operation}.svg").write_text(timeline_svg(drawn))
        for transport, label in (("direct", "NCCL"), ("copy", "copies")):
            points = []
            for m in rows:
                among = choices(transports=(transport,))
                way = choose(operation, m=m, **shape, among=among)
                p = predict(operation, m=m, **shape, pieces=way.pieces, transport=way.transport)
                points.append((m, p.hidden))
            name = f"{operation.replace('_', ' ')}, {label} (model)"
            series.append((name, COLORS[operation, transport], points))
    series.append(("symmetric memory (publ.)", "#d98c3f", SYMMETRIC_MEMORY))
    series.append(("Flux (published)", "#b04a5a", [(m, sum(FLUX) / 2) for m in rows]))
    curves = curves_svg(series, title="Communication hidden under the matmul", x_label="M (tokens)")
    (folder / "overlap_hidden.svg").write_text(curves)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; with --out also draws the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.overlap.report")
    parser.add_argument("--out", type=Path, help="folder to draw the plots into")
    parser.add_argument("--tflops", type=float, default=H100.peak / 1e12, help="peak of the matmul")
    parser.add_argument("--efficiency", type=float, default=H100.efficiency)
    parser.add_argument("--link", type=float, default=H100.link / 1e9, help="GB/s a GPU, each way")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--ranks", type=int, default=SIZE)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="M of each line")
    args = parser.parse_args(argv)
    for name in ("tflops", "efficiency", "link", "hidden", "features", "ranks"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(args, name)}")
    speeds = {"peak": args.tflops * 1e12, "efficiency": args.efficiency, "link": args.link * 1e9}
    machine = replace(H100, **speeds)
    what = shapes_of(args.hidden, args.features, args.ranks), args.rows, args.ranks, machine
    print(
        f"{args.tflops:g} TFLOP/s x {args.efficiency:.0%}, {args.link:g} GB/s a GPU each way, ",
        end="",
    )
    k, n = what[0]["all_gather_linear"]
    print(f"tp {args.ranks}\n\n{table(*what)}\n\n{pieces_table(*what)}\n")
    print(fused_table(k, n, *what[1:]))
    if args.out is not None:
        write_plots(args.out, *what)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
