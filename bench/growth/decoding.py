"""Growth of a token of SmolLM2: over the context, over rows of a batch, over context-parallel ranks."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch

from bench.growth.line import Line, median_s
from bench.rivals import MODEL
from pyparallel.decoding.cpu_decoder import CPUDecoder
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load

REPEATS = 9
PROMPT = list(range(100, 164))
NEW_TOKENS = 33
# What a token costs where it has nothing to attend to.
NO_CONTEXT = 1
_base: list[float] = []


def context_s(length: int) -> float:
    """Seconds of a token at position ``length``, beyond those of one at the front; tp = 2."""
    if not _base:
        _base.append(launch(at_position, 2, NO_CONTEXT, threads=1)[0])
    return launch(at_position, 2, length, threads=1)[0] - _base[0]


def at_position(position: int) -> float:
    decoder = CPUDecoder(load(MODEL, init_mesh(tp=2)))
    decoder.start(1, position + 1)
    for cache in decoder.cache:
        # Pages that nobody has written are one page of zeros, which costs no memory to read.
        cache.keys.normal_()
        cache.values.normal_()
    return after_one_s(lambda: decoder.decode([7], rows=[0], positions=[position]))


def batch_s(rows: int) -> float:
    """Seconds of a step of ``rows`` sequences, each at position 64; tp = 2."""
    return launch(of_rows, 2, rows, threads=1)[0]


def of_rows(rows: int) -> float:
    decoder = CPUDecoder(load(MODEL, init_mesh(tp=2)))
    decoder.start(rows, len(PROMPT) + 1)
    tokens = list(range(rows))

    def step() -> list[int]:
        decoder.decode(tokens, rows=range(rows), positions=[len(PROMPT)] * rows)
        return decoder.greedy()

    return after_one_s(step)


def ranks_s(ranks: int) -> float:
    """Seconds of a token where the context is cut over ``ranks`` ranks, on the cores there are."""
    with warnings.catch_warnings():
        # More ranks than cores is what is measured.
        warnings.simplefilter("ignore")
        return launch(over_context, ranks, ranks, threads=1)[0]


def over_context(ranks: int) -> float:
    model = load(MODEL, init_mesh(cp=ranks))
    times = []
    for _ in range(REPEATS):
        made = generate(model, [PROMPT], max_new_tokens=NEW_TOKENS, stop_ids=())
        times.append(made.decode_s / made.steps)
    return statistics.median(times[1:])


def after_one_s(work: Callable[[], object]) -> float:
    """Seconds of a call that is not the first."""
    with torch.inference_mode():
        work()
        return median_s(work, repeats=REPEATS, clock=time.perf_counter)


LINES = (
    Line(
        name="a token's attention, tp = 2",
        axis="context",
        unit="s",
        sizes=(1024, 2048, 4096, 8191),
        expected=1,
        measure=context_s,
    ),
    Line(
        name="a step of a batch, tp = 2",
        axis="rows",
        unit="s",
        sizes=(1, 4, 16, 64, 256),
        expected=1,
        measure=batch_s,
    ),
    Line(
        name="a token where the context is cut",
        axis="cp ranks",
        unit="s",
        sizes=(2, 4, 8),
        expected=0,
        measure=ranks_s,
    ),
)
