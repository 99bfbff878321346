"""Writes ``pyparallel/planner/data/fits/communication.json`` from published measurements.

``python -m bench.planner.fit_communication [FOLDER]``. Alpha and beta of each (system, op, ranks) are
the pair of least mean relative error over the sizes of 64 KB and more. The tables hold the times at
every fourfold size; the sizes between are not in them, and are what the tables are tested on.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.planner.compact_json import compact_json
from pyparallel.planner.fits import FOLDER

NCCL = "comm_nccl_nvlink_by_system.json"
CUSTOM = "comm_custom_allreduce.json"
LEAST_BYTES = 65536
KERNELS = {"vLLM_custom_graph": "vllm_graph", "vLLM_custom_eager": "vllm_eager", "TRTLLM": "trtllm"}
# As pyparallel.planner.hardware names them. The L40S of the measurements is a box whose sockets give 1
# to 2 GB/s where others give ten times that, so an L40S is left to the law and its own link.
SYSTEMS = {
    "A100-SXM4-80GB": "a100_sxm",
    "H100-SXM5-80GB": "h100_sxm",
    "H200-SXM-141GB": "h200_sxm",
    "B200-SXM-180GB": "b200_sxm",
    "GB200-NVL72": "gb200",
}

Series = dict[tuple[str, str, str, int], list[tuple[int, float]]]


def read_series(folder: Path) -> Series:
    """Sizes and microseconds of each (kernel, system, op, ranks), by size."""
    series: Series = defaultdict(list)
    for row in json.loads((folder / NCCL).read_text())["rows"]:
        op = row["op"].replace("alltoall", "all_to_all")
        key = ("nccl", row["system"], op, row["gpus"])
        series[key].append((row["bytes"], row["time_us"]))
    for row in json.loads((folder / CUSTOM).read_text())["rows"]:
        key = (KERNELS[row["kernel"]], row["system"], "all_reduce", row["gpus"])
        series[key].append((row["bytes"], row["time_us"]))
    return {key: sorted(points) for key, points in series.items()}


def fit_alpha_beta(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """Microseconds, and bytes a microsecond, of t = alpha + bytes / beta, by two grids."""
    sizes, times = (np.array(column, float) for column in zip(*points, strict=True))
    alpha, beta = times.min(), (sizes / times).max()
    for width in (3.0, 1.15):
        alphas = alpha * np.geomspace(1 / width, width, 81)[:, None, None]
        betas = beta * np.geomspace(1 / width, width, 81)[None, :, None]
        error = np.abs((alphas + sizes / betas) / times - 1).mean(axis=-1)
        best = np.unravel_index(error.argmin(), error.shape)
        alpha, beta = float(alphas[best[0], 0, 0]), float(betas[0, best[1], 0])
    return alpha, beta


def main(folder: Path) -> None:
    tables: dict[str, Any] = {}
    alpha_beta: dict[str, Any] = {}
    for (kernel, system, op, ranks), points in sorted(read_series(folder).items()):
        table = tables.setdefault(kernel, {"bytes": [size for size, _ in points[::2]]})
        places = table.setdefault(system, {}).setdefault(op, {})
        places[str(ranks)] = [time for _, time in points[::2]]
        large = [point for point in points if point[0] >= LEAST_BYTES]
        fit = [round(number, 2) for number in fit_alpha_beta(large)]
        place = alpha_beta.setdefault(kernel, {}).setdefault(system, {}).setdefault(op, {})
        place[str(ranks)] = fit
    written = {
        "source": "ai-dynamo/aiconfigurator silicon database @095f58a5 (Apache-2.0)",
        "calibrated_on": {
            "nccl": f"{NCCL}: every fourfold size from 512 bytes",
            "others": f"{CUSTOM}: every fourfold size from 256 bytes",
            "alpha_beta": f"both files, sizes of {LEAST_BYTES} bytes and more",
        },
        "units": "tables: microseconds at `bytes`; alpha_beta: microseconds, bytes a microsecond",
        "systems": SYSTEMS,
        "alpha_beta": alpha_beta,
        "tables": tables,
    }
    (FOLDER / "communication.json").write_text(compact_json(written))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/planner"))
