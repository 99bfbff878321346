"""The pipeline schedules of torch.distributed.pipelining by name, and what each asks for.

Legend: P ranks, v stages a rank, m micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Attributes:
        kind: the name of torch's class.
        order: how stages lie on ranks; see :func:`pyparallel.models.stage.stages_of_rank`.
        chunks: the least and the most v.
        several: its class takes a list of stages.
        fills: "pp": m is at least P; "rounds": m is a multiple of its rounds of P, which are m // P.
        splits: backward is split into the gradient of inputs and that of weights.
    """

    kind: str
    order: str = "loop"
    chunks: tuple[int, int] = (1, 1)
    several: bool = False
    fills: str = ""
    splits: bool = False


SCHEDULES = {
    "gpipe": Schedule("ScheduleGPipe"),
    "1f1b": Schedule("Schedule1F1B", fills="pp"),
    "interleaved": Schedule(
        "ScheduleInterleaved1F1B", chunks=(2, 64), several=True, fills="rounds"
    ),
    "zero_bubble": Schedule(
        "ScheduleInterleavedZeroBubble",
        chunks=(1, 64),
        several=True,
        fills="rounds",
        splits=True,
    ),
    "zero_bubble_v": Schedule(
        "ScheduleZBVZeroBubble", order="v", chunks=(2, 2), several=True, splits=True
    ),
}


def schedule_of(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name]


def check(name: str, *, ranks: int, chunks: int, num_microbatches: int) -> None:
    """Raise the ValueError of a schedule that can't be made of v = ``chunks`` stages a rank."""
    schedule = schedule_of(name)
    least, most = schedule.chunks
    if not least <= chunks <= most:
        wanted = str(least) if least == most else f"{least} or more"
        raise ValueError(
            f"stages: expected {wanted} a rank for schedule={name!r}, got {chunks}; load them with "
            f"load_stages(..., chunks={least}, order={schedule.order!r})"
        )
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches: expected at least 1, got {num_microbatches}")
    if schedule.fills == "pp" and num_microbatches < ranks:
        raise ValueError(
            f"num_microbatches: expected at least pp={ranks} for schedule={name!r}, got "
            f"{num_microbatches}; use 'gpipe' for fewer"
        )
    rounds = max(1, num_microbatches // ranks)
    if schedule.fills == "rounds" and num_microbatches % rounds:
        raise ValueError(
            f"num_microbatches: expected a multiple of its rounds of pp={ranks}, which are {rounds}, "
            f"for schedule={name!r}, got {num_microbatches}; use {ranks * rounds}"
        )


def bubble(name: str, *, ranks: int, chunks: int, num_microbatches: int) -> float:
    """The part of a step in which a rank waits, where all stages cost the same.

    (P-1) / (m+P-1) of GPipe and 1F1B, (P-1) / (v m+P-1) interleaved. Zero-bubble schedules fill it with
    the weights' gradients: where a forward, a gradient of inputs and one of weights take one unit each,
    (P-1) / (3 v m+P-1) is left of the first, and nothing of the V.

    Sources: Huang et al. 2019, "GPipe"; Narayanan et al. 2021, "Efficient large-scale language model
    training on GPU clusters using Megatron-LM", section 2.2; Qi et al. 2023, "Zero bubble pipeline
    parallelism", sections 2 and 6.
    """
    if name == "zero_bubble_v":
        return 0.0
    work = chunks * num_microbatches * (3 if schedule_of(name).splits else 1)
    return (ranks - 1) / (work + ranks - 1)
