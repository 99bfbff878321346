"""Time against bytes at 2, 3, 4 and 8 ranks, from the JSON of bench/comm/collectives.py.

python -m bench.comm.collectives_plot RESULT.json PLOT.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from bench.comm.collectives_ranks import OPERATIONS


def main(source: str, target: str) -> None:
    """Draw one panel an operation, one line an engine and world size."""
    runs = json.loads(Path(source).read_text())["benchmarks"]
    figure, panels = pyplot.subplots(1, len(OPERATIONS), figsize=(15, 5), sharey=True)
    for panel, operation in zip(panels, OPERATIONS, strict=True):
        for engine, style in (("pyparallel", "-"), ("intel_mpi", "--"), ("gloo", ":")):
            for color, world in enumerate((2, 3, 4, 8)):
                points = sorted(
                    (run["extra_info"]["bytes"], run["stats"]["median"] * 1e6)
                    for run in runs
                    if (run["extra_info"]["op"], run["extra_info"]["backend"])
                    == (operation, engine)
                    and run["extra_info"]["world"] == world
                )
                if points:
                    panel.loglog(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{color}",
                        marker=".",
                        label=f"{engine}, {world} ranks",
                    )
        panel.set(title=operation, xlabel="bytes")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("median time of a call, us")
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
