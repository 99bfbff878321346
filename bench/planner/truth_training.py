"""Published step times of training against the planner's.

The floor is a roofline of three constants for all GPUs: products at 0.6 of the peak, messages at 0.7
of the slowest link of what a step sends, and the bubble of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.planner import training_rows, training_rows_llm
from bench.planner.training_case import Case
from bench.planner.truth import Pair, Reader, Reading
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy, Training
from pyparallel.planner.training_time import model_flops, training_time

FLOPS_SHARE, LINK_SHARE = 0.6, 0.7


def floor_seconds(
    shape: ModelShape, strategy: Strategy, training: Training, cluster: Cluster
) -> float:
    """A step by one line: FLOPs, the bytes of tp and dp on their links, and the bubble."""
    flops = model_flops(shape, training) * (4 / 3 if strategy.recompute == "layers" else 1)
    peak = cluster.gpu.peak_flops(training.dtype)
    compute = flops / strategy.ranks / (FLOPS_SHARE * peak)
    tokens = training.tokens / strategy.dp / strategy.cp
    ring = 2 * (strategy.tp - 1) / strategy.tp
    sent = 4 * ring * 2 * tokens * shape.hidden * shape.layers / strategy.pp
    messages = sent / (LINK_SHARE * cluster.link(strategy.tp).bytes_per_s)
    replicas = strategy.dp * strategy.cp
    held = shape.parameters() / strategy.tp / strategy.pp
    if replicas > 1:
        rate = LINK_SHARE * cluster.link(strategy.tp * replicas).bytes_per_s
        messages += 2 * 4 * held / rate
    bubble = (strategy.pp - 1) / (strategy.virtual_stages * training.micro_batches(strategy))
    return (compute + messages) * (1 + bubble)


def pair_of(case: Case) -> Pair:
    """A case with what the planner and the floor say of it.

    Raises:
        ValueError: the planner refuses the cut.
    """
    work = (case.shape, case.strategy, case.training, case.cluster)
    return Pair(
        case.quantity,
        training_time(*work, engine=case.engine).total,
        case.seconds,
        floor_seconds(*work),
        "s",
        case.calibrated,
        f"{case.shape.name} {case.strategy} mbs {case.strategy.micro_batch} {case.training.dtype}",
        case.group,
    )


@dataclass(frozen=True)
class _File:
    """The reader of one file's rows."""

    name: str

    def __call__(self, content: Mapping[str, Any]) -> Reading:
        reading = Reading()
        for case in cases(self.name, content, reading):
            try:
                reading.pairs.append(pair_of(case))
            except ValueError as error:
                reading.unused[str(error).partition(",")[0]] += 1
        return reading


def cases(name: str, content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """The rows of a file as what the planner takes; those that can't be are counted in ``reading``."""
    return ROWS[name](content, reading)


ROWS = training_rows.ROWS | training_rows_llm.ROWS
READERS: dict[str, Reader] = {name: _File(name) for name in ROWS}
