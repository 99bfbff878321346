"""Writes ``pyparallel/planner/data/fits/inference.json``: five constants of each engine on each GPU.

``python -m bench.planner.fit_inference [FOLDER]``. Engines that serve are fitted to the time per token
of ``infer_serving_dense_tp_sweeps.json``, TensorRT-LLM under its own load generator to the tokens per
second of ``infer_trtllm_tp_sweeps.json``; all other files are only reported on. What is made least is
the mean of |log(predicted / measured)|, where no row counts for more than 0.5, by a random walk from
one seed.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.planner.compact_json import compact_json
from bench.planner.serving_rows import Served, served
from pyparallel.planner.communication import Kernel
from pyparallel.planner.engine_rates import Constants, EngineRates, constants_of
from pyparallel.planner.fits import FOLDER, system_of

SERVING = "infer_serving_dense_tp_sweeps.json"
LOAD = "infer_trtllm_tp_sweeps.json"
KERNELS: dict[str, Kernel] = {
    "vllm": "vllm_graph",
    "sglang": "vllm_graph",
    "trtllm": "trtllm",
    "trtllm_bench": "trtllm",
}
# Whose constants stand in on a GPU that an engine was not measured on: of its measured GPUs, one.
OTHERS = {
    "vllm": "h200_sxm",
    "sglang": "h100_sxm",
    "trtllm": "h200_sxm",
    "trtllm_bench": "h200_sxm",
}
# SGLang schedules prefills before decode steps.
PREFILLS_FIRST = ("sglang",)
LEAST_ROWS = 30
START = (0.8, 0.8, 20.0, 1000.0, 10.0)
STEPS = 1500
MOST = 0.5


def engine(name: str, constants: Constants) -> EngineRates:
    """An engine of these constants, whatever its fitted ones are."""
    return EngineRates(
        name, constants, KERNELS[name], "", name.startswith("trtllm"), name in PREFILLS_FIRST
    )


def fit(rows: Sequence[Served], quantity: Callable[[Served, EngineRates], float]) -> list[float]:
    """The five of the rows' engine on their GPU.

    Args:
        quantity: predicted over measured.
    """
    generator = random.Random(0)
    name = rows[0].engine

    def loss(numbers: Sequence[float]) -> float:
        chosen = engine(name, constants_of(list(numbers)))
        return sum(min(MOST, abs(math.log(quantity(row, chosen)))) for row in rows) / len(rows)

    best, least = list(START), loss(START)
    for step in range(STEPS):
        width = 0.02 + 0.5 * 0.997**step
        trial = [
            number * math.exp(generator.gauss(0, width)) if generator.random() < 0.5 else number
            for number in best
        ]
        trial[:2] = [min(1.0, max(0.05, fraction)) for fraction in trial[:2]]
        found = loss(trial)
        if found < least:
            best, least = trial, found
    return [float(f"{number:.3g}") for number in best]


def time_per_token(row: Served, chosen: EngineRates) -> float:
    return row.speed(chosen).tpot_s / row.tpot_s


def tokens_per_s(row: Served, chosen: EngineRates) -> float:
    return row.speed(chosen).tokens_per_s / row.tokens_per_s


def _entry(name: str, rows: Mapping[str, Sequence[Served]]) -> dict[str, Any]:
    """All of one engine: on each GPU; on one it was not measured on; and on each as if it were that."""
    load = name == "trtllm_bench"
    quantity = tokens_per_s if load else time_per_token

    def together(systems: Iterable[str]) -> list[float]:
        # As many rows of each, so that the GPU with the most does not decide alone.
        chosen = [row for system in systems for row in rows[system][:: -(-len(rows[system]) // 60)]]
        return fit(chosen, quantity)

    entry = {
        "calibrated_on": LOAD if load else SERVING,
        "kernel": KERNELS[name],
        "reserves": name.startswith("trtllm"),
        "prefills_first": name in PREFILLS_FIRST,
        "constants": {system: fit(each, quantity) for system, each in rows.items()},
        "others": together(rows),
        "without": {
            system: together(other for other in rows if other != system) for system in rows
        },
    }
    print(name, json.dumps(entry), flush=True)
    return entry


def main(folder: Path) -> None:
    groups: dict[tuple[str, str], list[Served]] = defaultdict(list)
    for row in json.loads((folder / SERVING).read_text())["rows"]:
        found = served(row, row["backend"])
        # Requests that wait for memory have the batch of those that don't, but not their prefills.
        if (
            row["tpot_ms"]
            and not found.speed(engine(found.engine, constants_of(list(START)))).queued
        ):
            groups[found.engine, system_of(found.cluster.gpu.name)].append(found)
    for row in json.loads((folder / LOAD).read_text())["rows"]:
        if row["output_tok_s"]:
            found = served(row, "trtllm_bench")
            groups["trtllm_bench", system_of(found.cluster.gpu.name)].append(found)
    engines = {
        name: _entry(
            name,
            {
                system: rows
                for (engine_name, system), rows in sorted(groups.items())
                if engine_name == name and len(rows) >= LEAST_ROWS
            },
        )
        for name in KERNELS
    }
    written = {
        "source": "ai-dynamo/aiconfigurator systems/silicon_sample.csv @095f58a5 (Apache-2.0); "
        "NVIDIA/TensorRT-LLM docs/source/performance/perf-overview.md @258c7540",
        "constants": "memory fraction, flops fraction, microseconds a layer, a step, a sequence; "
        "others: of all measured GPUs together; without: of all but the one it is named for",
        "engines": engines,
    }
    (FOLDER / "inference.json").write_text(compact_json(written))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/planner"))
