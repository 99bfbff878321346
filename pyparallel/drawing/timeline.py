"""The timeline of a pipeline: one step of its stages under GPipe or 1F1B, and the bubble in it.

Legend: P ranks, m micro-batches. Rank p of 1F1B makes P - p forwards (as many as there are) before its
first backward, then a forward after each backward. A stage's forward takes what its layers and its head
cost, a backward twice as long; sending takes no time.
Sources: Huang et al. 2019, "GPipe"; Narayanan et al. 2021, "Efficient large-scale language model
training on GPU clusters using Megatron-LM", section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyparallel.drawing.svg import MARGIN, WIDTH, Block, clipped, rect, text
from pyparallel.models.config import DecoderConfig
from pyparallel.models.stage import Stage
from pyparallel.training.pipeline_schedules import bubble

KINDS = ("gpipe", "1f1b")
LEFT, ROW = 200, 26
_FORWARD, _BACKWARD = "#7db0e8", "#86cf8a"


@dataclass(frozen=True)
class Step:
    """One micro-batch on one rank, from ``start`` to ``stop``."""

    rank: int
    backward: bool
    micro_batch: int
    start: float
    stop: float


def order_of(schedule: str, ranks: int, rank: int, micro_batches: int) -> list[tuple[bool, int]]:
    """What a rank does, in turn: (backward, micro-batch).

    Raises:
        ValueError: another schedule.

    >>> [f"{'FB'[b]}{i}" for b, i in order_of("1f1b", 2, 0, 3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    if schedule not in KINDS:
        raise ValueError(f"schedule: expected one of {', '.join(KINDS)}, got {schedule!r}")
    ahead = micro_batches if schedule == "gpipe" else min(micro_batches, ranks - rank)
    found = [(False, index) for index in range(ahead)]
    for index in range(micro_batches):
        found.append((True, index))
        if ahead + index < micro_batches:
            found.append((False, ahead + index))
    return found


def steps_of(schedule: str, costs: Sequence[float], micro_batches: int) -> list[Step]:
    """When everything runs, each thing as early as it can.

    Args:
        costs: of a forward of each rank's stage.
    """
    ranks = len(costs)
    waiting = [order_of(schedule, ranks, rank, micro_batches) for rank in range(ranks)]
    ended: dict[tuple[int, bool, int], float] = {}
    free = [0.0] * ranks
    steps: list[Step] = []
    while any(waiting):
        for rank in range(ranks):
            while waiting[rank]:
                backward, index = waiting[rank][0]
                # A backward waits for the next rank's, the last rank's for its own forward.
                if backward:
                    before = (rank + 1, True) if rank + 1 < ranks else (rank, False)
                else:
                    before = (rank - 1, False)
                ready = 0.0 if before[0] < 0 else ended.get((*before, index))
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = stop = start + costs[rank] * (2 if backward else 1)
                ended[rank, backward, index] = stop
                steps.append(Step(rank, backward, index, start, stop))
                waiting[rank].pop(0)
    return steps


def idle_part(steps: Sequence[Step], ranks: int) -> float:
    """The part of all ranks' time in which they wait."""
    whole = ranks * max(step.stop for step in steps)
    return 1 - sum(step.stop - step.start for step in steps) / whole


def stage_costs(config: DecoderConfig, stages: Sequence[Stage], layer_numbers: int) -> list[float]:
    """A forward of each stage in units of a layer; the last one has the head."""
    head = config.vocab_size * config.hidden_size / layer_numbers
    return [len(stage.layers) + (head if stage.is_last else 0.0) for stage in stages]


def timeline_block(
    stages: Sequence[Stage], costs: Sequence[float], micro_batches: int, schedule: str, message: str
) -> Block:
    """A row a rank: forwards, backwards, and what is left empty.

    Args:
        message: what a rank of a stage hands to the next.
    """
    ranks = len(stages)
    steps = steps_of(schedule, costs, micro_batches)
    scale = (WIDTH - LEFT - MARGIN) / max(step.stop for step in steps)
    idle = idle_part(steps, ranks)
    even = bubble(schedule, ranks=ranks, chunks=1, num_microbatches=micro_batches)
    shapes = [
        text(MARGIN, 12, f"Pipeline: {schedule}, {micro_batches} micro-batches", style="head"),
        text(
            MARGIN,
            28,
            f"ranks wait {100 * idle:.1f} % of the step ({100 * even:.1f} % if all stages cost the "
            f"same); a rank hands on {message}",
            style="note",
        ),
    ]
    for rank, stage in enumerate(stages):
        y = 38 + rank * (ROW + 4)
        layers = f"layers {stage.layers.start}-{stage.layers.stop - 1}"
        ends = " + embedding" if stage.is_first else " + head" if stage.is_last else ""
        shapes.append(text(MARGIN, y + 17, f"{rank}: {layers}{ends}"))
        shapes.append(rect(LEFT, y, WIDTH - LEFT - MARGIN, ROW, style="empty"))
    for step in steps:
        y, width = 38 + step.rank * (ROW + 4), (step.stop - step.start) * scale
        name = f"{'backward' if step.backward else 'forward'} {step.micro_batch}"
        tip = f"{name} on rank {step.rank}, {step.start:.4g} to {step.stop:.4g} layers' time"
        fill = _BACKWARD if step.backward else _FORWARD
        x = LEFT + step.start * scale
        data = f"{name}/{step.rank}"
        shapes.append(rect(x, y, max(width - 0.8, 0.2), ROW, fill=fill, tip=tip, data=data))
        words = clipped(str(step.micro_batch), width)
        shapes.append(text(x + width / 2, y + 17, words, style="on", anchor="middle"))
    y = 38 + ranks * (ROW + 4)
    for place, (fill, words) in enumerate(((_FORWARD, "forward"), (_BACKWARD, "backward"))):
        shapes.append(rect(LEFT + 120 * place, y + 2, 12, 12, fill=fill))
        shapes.append(text(LEFT + 120 * place + 18, y + 12, words, style="note"))
    return Block(y + 16, tuple(shapes))
