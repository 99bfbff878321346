"""Time a token by context and by layers, from the JSON of bench/decoding/decode_cost.py.

python -m bench.decoding.decode_cost_plot RESULT.json PLOT.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def main(source: str, target: str) -> None:
    """Draw what was measured, and dashed what the bytes of the cache cost at the read bandwidth."""
    runs = [run["extra_info"] for run in json.loads(Path(source).read_text())["benchmarks"]]
    figure, (contexts, layers) = pyplot.subplots(1, 2, figsize=(11, 4))
    for color, run in enumerate(run for run in runs if run["op"] == "decode by context"):
        positions = [int(position) for position in run["seconds"]]
        times = list(run["seconds"].values())
        read = list(run["cache_bytes"].values())
        bound = [times[0] + (b - read[0]) / run["bandwidth"] for b in read]
        style = {"color": f"C{color}", "marker": "."}
        contexts.plot(positions, [1e3 * t for t in times], "-", label=run["dtype"], **style)
        contexts.plot(
            positions,
            [1e3 * t for t in bound],
            "--",
            label=f"{run['dtype']}, cache bytes at {run['bandwidth'] / 1e9:.0f} GB/s",
            **style,
        )
    contexts.set(title="SmolLM2-135M, tp=2", xlabel="position")
    for run in (run for run in runs if run["op"] == "decode by layers"):
        counts = [int(count) for count in run["seconds"]]
        layers.plot(counts, [1e3 * t for t in run["seconds"].values()], "-o", label=run["dtype"])
    layers.set(title="its first layers, tp=2", xlabel="layers")
    for panel in (contexts, layers):
        panel.set_ylabel("milliseconds a token")
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
