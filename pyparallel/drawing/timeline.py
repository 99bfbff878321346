"""The timeline of a pipeline: one step of its stages under a schedule, and the bubble in it.

Legend: P ranks, v stages a rank (chunks), m micro-batches. Stage s lies on rank s mod P.

    gpipe         all forwards, then all backwards
    1f1b          rank p makes P - p forwards (as many as there are) before its first backward, then a
                  forward after each backward
    interleaved   P micro-batches go through a chunk, then through the next one; rank p is
                  (v - 1) P + 2 (P - 1 - p) forwards ahead of its backwards

A stage's forward takes what its layers and its head cost, a backward twice as long; sending takes no
time.
Sources: Huang et al. 2019, "GPipe"; Narayanan et al. 2021, "Efficient large-scale language model
training on GPU clusters using Megatron-LM", section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pyparallel.drawing.svg import MARGIN, WIDTH, Block, clipped, paler, rect, text
from pyparallel.models.config import DecoderConfig
from pyparallel.models.stage import Stage, stages_of_rank
from pyparallel.training.pipeline_schedules import bubble

KINDS = ("gpipe", "1f1b", "interleaved")
LEFT, ROW = 200, 26
_FORWARD, _BACKWARD = "#7db0e8", "#86cf8a"


class Pass(NamedTuple):
    """A forward or a backward of one micro-batch through one of a rank's chunks."""

    backward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Step:
    """One pass on one rank, from ``start`` to ``stop``."""

    rank: int
    passing: Pass
    start: float
    stop: float


def order_of(
    schedule: str, ranks: int, rank: int, micro_batches: int, chunks: int = 1
) -> list[Pass]:
    """What a rank does, in turn.

    Raises:
        ValueError: another schedule; several chunks of a schedule of one; interleaved micro-batches that
            are no whole rounds of the ranks.

    >>> [f"{'FB'[p.backward]}{p.micro_batch}" for p in order_of("1f1b", 2, 0, 3)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    if schedule not in KINDS:
        raise ValueError(f"schedule: expected one of {', '.join(KINDS)}, got {schedule!r}")
    if (schedule == "interleaved") != (chunks > 1):
        raise ValueError(
            f"chunks: expected {'2 or more' if schedule == 'interleaved' else 1} a rank for "
            f"{schedule}, got {chunks}"
        )
    if chunks > 1 and micro_batches % ranks:
        raise ValueError(
            f"micro_batches: expected a multiple of pp={ranks} for {schedule}, got {micro_batches}; "
            f"use {-(-micro_batches // ranks) * ranks}"
        )
    total = chunks * micro_batches
    ahead = {"gpipe": total, "1f1b": ranks - rank}.get(schedule)
    if ahead is None:
        # The forward that goes before the first backward is the next one's.
        ahead = (chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1
    ahead = min(total, ahead)

    def passing(number: int, backward: bool) -> Pass:
        if chunks == 1:
            return Pass(backward, 0, number)
        chunk = number // ranks % chunks
        batch = number // (ranks * chunks) * ranks + number % ranks
        return Pass(backward, chunks - 1 - chunk if backward else chunk, batch)

    found = [passing(number, False) for number in range(ahead)]
    for number in range(total):
        found.append(passing(number, True))
        if ahead + number < total:
            found.append(passing(ahead + number, False))
    return found


def steps_of(schedule: str, costs: Sequence[float], ranks: int, micro_batches: int) -> list[Step]:
    """When everything runs, each thing as early as it can.

    Args:
        costs: of a forward of each stage, of which rank p has every P-th from the p-th on.
    """
    chunks, last = len(costs) // ranks, len(costs) - 1
    waiting = [order_of(schedule, ranks, rank, micro_batches, chunks) for rank in range(ranks)]
    ended: dict[tuple[int, bool, int], float] = {}
    free = [0.0] * ranks
    steps: list[Step] = []
    while any(waiting):
        for rank in range(ranks):
            while waiting[rank]:
                passing = waiting[rank][0]
                backward, batch = passing.backward, passing.micro_batch
                stage = passing.chunk * ranks + rank
                # A backward waits for the next stage's, the last stage's for its own forward.
                before = (stage + 1, True) if backward and stage < last else (stage, False)
                if not backward:
                    before = stage - 1, False
                ready = 0.0 if before[0] < 0 else ended.get((*before, batch))
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = stop = start + costs[stage] * (2 if backward else 1)
                ended[stage, backward, batch] = stop
                steps.append(Step(rank, passing, start, stop))
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
    stages: Sequence[Stage],
    costs: Sequence[float],
    ranks: int,
    micro_batches: int,
    schedule: str,
    message: str,
) -> Block:
    """A row a rank: forwards, backwards, and what is left empty; later chunks are paler.

    Args:
        message: what a rank of a stage hands to the next.
    """
    chunks = len(stages) // ranks
    steps = steps_of(schedule, costs, ranks, micro_batches)
    scale = (WIDTH - LEFT - MARGIN) / max(step.stop for step in steps)
    idle = idle_part(steps, ranks)
    even = bubble(schedule, ranks=ranks, chunks=chunks, num_microbatches=micro_batches)
    title = f"Pipeline: {schedule}, {micro_batches} micro-batches"
    title += f", {chunks} chunks of layers a rank, later ones paler" if chunks > 1 else ""
    shapes = [
        text(MARGIN, 12, title, style="head"),
        text(
            MARGIN,
            28,
            f"ranks wait {100 * idle:.1f} % of the step ({100 * even:.1f} % if all stages cost the "
            f"same); a rank hands on {message}",
            style="note",
        ),
    ]
    for rank in range(ranks):
        y = 38 + rank * (ROW + 4)
        own = [stages[index] for index in stages_of_rank(ranks, rank, chunks)]
        layers = ", ".join(f"{s.layers.start}-{s.layers.stop - 1}" for s in own[:3])
        layers += ", ..." if chunks > 3 else ""
        ends = " + embedding" if own[0].is_first else " + head" if own[-1].is_last else ""
        words = f"{rank}: {'layers ' if chunks == 1 else ''}{layers}{ends}"
        shapes.append(text(MARGIN, y + 17, words))
        shapes.append(rect(LEFT, y, WIDTH - LEFT - MARGIN, ROW, style="empty"))
    for step in steps:
        shapes += _step(step, 38 + step.rank * (ROW + 4), scale, chunks)
    y = 38 + ranks * (ROW + 4)
    for place, (fill, words) in enumerate(((_FORWARD, "forward"), (_BACKWARD, "backward"))):
        shapes.append(rect(LEFT + 120 * place, y + 2, 12, 12, fill=fill))
        shapes.append(text(LEFT + 120 * place + 18, y + 12, words, style="note"))
    return Block(y + 16, tuple(shapes))


def _step(step: Step, y: float, scale: float, chunks: int) -> list[str]:
    backward, chunk, batch = step.passing
    x, width = LEFT + step.start * scale, (step.stop - step.start) * scale
    name = f"{'backward' if backward else 'forward'} {batch}"
    name += f" of chunk {chunk}" if chunks > 1 else ""
    tip = f"{name} on rank {step.rank}, {step.start:.4g} to {step.stop:.4g} layers' time"
    fill = paler(_BACKWARD if backward else _FORWARD, 0.6 * chunk / chunks)
    words = clipped(str(batch), width)
    return [
        rect(x, y, max(width - 0.8, 0.2), ROW, fill=fill, tip=tip, data=f"{name}/{step.rank}"),
        text(x + width / 2, y + 17, words, style="on", anchor="middle"),
    ]
