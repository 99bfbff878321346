"""Predicted against measured: a PNG a file."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.planner.truth import Pair


def plot(pairs_of: Mapping[str, Sequence[Pair]], folder: Path) -> None:
    """Write ``folder/<file>.png`` of each file; without matplotlib, say so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: pip install matplotlib, or pyparallel-kernels[bench]", file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file, pairs in pairs_of.items():
        quantities: dict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            if pair.unit != "label" and pair.measured > 0 and pair.predicted > 0:
                quantities[f"{pair.quantity} [{pair.unit}]"].append(pair)
        if not quantities:
            continue
        figure, axes = plt.subplots(figsize=(8, 7))
        for name, drawn in sorted(quantities.items()):
            measured = [pair.measured for pair in drawn]
            axes.scatter(measured, [pair.predicted for pair in drawn], s=8, alpha=0.6, label=name)
        ends = [
            end(pair.measured for drawn in quantities.values() for pair in drawn)
            for end in (min, max)
        ]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="measured", ylabel="predicted", title=file)
        axes.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / f"{Path(file).stem}.png", dpi=120)
        plt.close(figure)
    print(f"plots: {folder}", file=sys.stderr)
