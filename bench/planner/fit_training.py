"""Fit the constants of a training step, and say what to write into ``data/fits/training.toml``.

    python -m bench.planner.fit_training FOLDER

Each GPU type has one file that it is fitted on; every other file is reported with what came out. The
loss is the mean of |log(predicted / measured)|, and the search moves one constant at a time by
ever smaller steps, from the defaults.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.planner.training_rows import ROWS, Case
from bench.planner.truth import Reading, load
from pyparallel.planner.roofline import Rates
from pyparallel.planner.training_time import training_time

# File, and which of its rows: every n-th, where there are many of a kind.
CALIBRATION = {
    "A100": ("train_vtrain_single_a100.json", 7),
    "H100": ("train_dgxc_nemo_llama31_h100.json", 1),
}
# The least and the most of each constant, and the factor of the first step.
BOUNDS = {
    "matmul": (0.3, 1.0),
    "attention": (0.2, 0.9),
    "bandwidth": (0.3, 1.0),
    "host_s": (5e-5, 5e-3),
    "overlap": (0.0, 1.0),
}
ROUNDS = 14


def loss(cases: Sequence[Case], rates: Rates) -> float:
    """The mean of |log(predicted / measured)|."""
    total = 0.0
    for case in cases:
        step = training_time(
            case.shape, case.strategy, case.training, case.cluster, engine=case.engine, rates=rates
        )
        total += abs(math.log(step.total / case.seconds))
    return total / len(cases)


def fit(evaluate: Callable[[Rates], float]) -> Rates:
    """The constants of the least loss that a search from the defaults finds."""
    best, step = Rates(), 1.3
    least = evaluate(best)
    for _ in range(ROUNDS):
        for name, (low, high) in BOUNDS.items():
            for factor in (step, 1 / step):
                value = min(high, max(low, getattr(best, name) * factor))
                tried = replace(best, **{name: value})
                if (found := evaluate(tried)) < least - 1e-6:
                    best, least = tried, found
        step = 1 + (step - 1) * 0.8
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for gpu, (name, every) in CALIBRATION.items():
        rows = ROWS[name](load(folder / name), Reading())
        cases = [case for case in rows if case.calibrated][::every]
        rates = fit(lambda tried, cases=cases: loss(cases, tried))
        print(f"[{gpu}]")
        for key, value in asdict(rates).items():
            print(f"{key} = {value:.3g}")
        print(f'fitted = "{name}"')
        print(f"# mean |log error| {loss(cases, rates):.3f} of {len(cases)} rows\n")


if __name__ == "__main__":
    main()
