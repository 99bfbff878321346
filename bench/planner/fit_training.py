"""Fit the constants of a training step, and say what to write into ``data/fits/training.toml``.

    python -m bench.planner.fit_training FOLDER

Each GPU type has one file that it is fitted on; every other file is reported with what came out. The
loss is the mean of |log(predicted / measured)|, and the search a random walk from the defaults.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.planner.training_case import Case
from bench.planner.truth import Reading, load
from bench.planner.truth_training import ROWS
from pyparallel.planner.roofline import Rates
from pyparallel.planner.training_time import training_time

# File, and which of its rows: every n-th, where there are many of a kind.
CALIBRATION = {
    "A100": ("train_vtrain_single_a100.json", 7),
    "H100": ("train_dgxc_nemo_llama31_h100.json", 1),
    "GB200": ("train_megatron_bridge_perf.json", 1),
}
# No row of vTrain's has flash attention, and none of NeMo's is so small that the host is what counts.
FITTED = {
    "A100": ("matmul", "bandwidth", "host_s", "overlap", "messages"),
    "H100": ("matmul", "attention", "bandwidth", "overlap", "messages"),
    "GB200": ("matmul", "attention", "bandwidth", "overlap", "messages"),
}
# The least and the most of each constant.
BOUNDS = {
    "matmul": (0.3, 1.0),
    "attention": (0.2, 0.9),
    "bandwidth": (0.3, 1.0),
    "host_s": (5e-5, 5e-3),
    "overlap": (0.0, 1.0),
    "messages": (0.5, 3.0),
}
STEPS = 400


def loss(cases: Sequence[Case], rates: Rates) -> float:
    """The mean of |log(predicted / measured)|."""
    total = 0.0
    for case in cases:
        step = training_time(
            case.shape, case.strategy, case.training, case.cluster, engine=case.engine, rates=rates
        )
        total += abs(math.log(step.total / case.seconds))
    return total / len(cases)


def fit(evaluate: Callable[[Rates], float], names: Sequence[str]) -> Rates:
    """Constants ``names`` of the least loss that a walk from the defaults finds; always the same."""
    generator = random.Random(0)
    best = Rates()
    least = evaluate(best)
    for step in range(STEPS):
        width = 0.3 * (1 - step / STEPS) + 0.02
        changed = {}
        for name in generator.sample(names, generator.randint(1, len(names))):
            low, high = BOUNDS[name]
            value = getattr(best, name) * math.exp(generator.gauss(0, width))
            changed[name] = min(high, max(low, value))
        tried = replace(best, **changed)
        if (found := evaluate(tried)) < least:
            best, least = tried, found
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for gpu, (name, every) in CALIBRATION.items():
        rows = ROWS[name](load(folder / name), Reading())
        cases = [case for case in rows if case.calibrated][::every]
        rates = fit(lambda tried, cases=cases: loss(cases, tried), FITTED[gpu])
        print(f"[{gpu}]")
        for key, value in asdict(rates).items():
            print(f"{key} = {value:.3g}")
        print(f'fitted = "{name}"')
        print(f"# mean |log error| {loss(cases, rates):.3f} of {len(cases)} rows\n")


if __name__ == "__main__":
    main()
