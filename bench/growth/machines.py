"""Growth of the collectives between machines over how many there are, for a tensor of one size.

The machines are network namespaces on this one, of two ranks each. What limits machines of their own is
the link, so the most bytes that any of them sends in a call is a line, as its interface counts them.
What limits them here is the processor they share, so the CPU seconds of all ranks are another. Both are
held to what a ring costs: a machine of M sends ``2 (M - 1) / M`` of the tensor in an all-reduce and half
of that in a reduce-scatter, all together M times as much. The third is the time over links of 100
Mbit/s, which leave the processor idle: a pass through all machines takes as long as the tensor does over
one link, and as one slice does over those of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

from bench.comm.collectives_machines import measured
from bench.comm.machines_ranks import Found
from bench.growth.line import Line, exponent
from pyparallel.comm.hierarchical import LONGEST_SLICE, SHORTEST_SLICE, SLICES_A_MACHINE

NUM_BYTES = 16 << 20
RANKS = 2
SIZES = (2, 3, 4, 6, 8)
SLOW_SIZES = (3, 4, 6, 8)
SLOW_MEGABITS = 100
TURNS = 3


@cache
def _found(machines: int, megabits: int | None) -> dict[str, Found]:
    found = measured(
        [RANKS] * machines,
        operations=("all_reduce", "reduce_scatter"),
        num_bytes=(NUM_BYTES,),
        engines=("pyparallel",),
        turns=TURNS,
        megabits=megabits,
    )
    return {one.operation: one for one in found}


def _sent(operation: str) -> Callable[[int], float]:
    return lambda machines: max(_found(machines, None)[operation].sent)


def _cpu(operation: str) -> Callable[[int], float]:
    return lambda machines: _found(machines, None)[operation].cpu_s


def _slow(operation: str) -> Callable[[int], float]:
    return lambda machines: statistics.median(_found(machines, SLOW_MEGABITS)[operation].seconds)


def _passing(machines: int) -> float:
    """Bytes that one pass of the slices through all machines takes the time of."""
    wanted = NUM_BYTES // (SLICES_A_MACHINE * machines)
    return NUM_BYTES + (machines - 1) * min(max(wanted, SHORTEST_SLICE), LONGEST_SLICE)


def _lines(operation: str) -> tuple[Line, ...]:
    name = operation.replace("_", "-")
    return (
        Line(
            name=f"{name}, sent by a machine",
            axis="machines",
            unit="bytes",
            sizes=SIZES,
            expected=round(exponent(SIZES, [(m - 1) / m for m in SIZES]), 2),
            measure=_sent(operation),
        ),
        Line(
            name=f"{name}, of all ranks",
            axis="machines",
            unit="s of CPU",
            sizes=SIZES,
            expected=round(exponent(SIZES, [m - 1 for m in SIZES]), 2),
            measure=_cpu(operation),
        ),
        Line(
            name=f"{name}, {SLOW_MEGABITS} Mbit/s",
            axis="machines",
            unit="s",
            sizes=SLOW_SIZES,
            expected=round(exponent(SLOW_SIZES, [_passing(m) for m in SLOW_SIZES]), 2),
            measure=_slow(operation),
        ),
    )


LINES = (*_lines("all_reduce"), *_lines("reduce_scatter"))
