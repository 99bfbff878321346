"""Executes schedules on CPU ranks: a thread for every stream, random delays, every access watched.

What the CUDA executor leaves to the GPU happens here in the open. A region is checked, at run time,
for a second toucher while one writes it and for a change of its bytes while it is only read; buffers
start as NaN, and a receive poisons its place before anything lands there, so data that is used too
early shows in the result.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.overlap.links import Mailbox, RaceError, same_bits
from pyparallel.overlap.pipelines import Pipeline
from pyparallel.overlap.schedule import STREAMS, Region, Step


class _Watch:
    """Who is touching which region right now, on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lock = threading.Lock()
        self.active: dict[Region, list[tuple[str, bool]]] = {}

    def enter(self, step: Step) -> None:
        with self.lock:
            for region, writes in self._touched(step):
                for other, other_writes in self.active.get(region, []):
                    if other != step.name and (writes or other_writes):
                        raise RaceError(
                            f"rank {self.rank}: {step.name!r} and {other!r} touch {region} at once"
                        )
                self.active.setdefault(region, []).append((step.name, writes))

    def leave(self, step: Step) -> None:
        with self.lock:
            for region, writes in self._touched(step):
                self.active[region].remove((step.name, writes))

    @staticmethod
    def _touched(step: Step) -> list[tuple[Region, bool]]:
        return [(r, False) for r in step.reads] + [(r, True) for r in step.writes]


def run_rank(
    pipeline: Pipeline,
    *,
    seed: int,
    max_delay: float,
    timeout: float = 30.0,
    mailbox: Mailbox | None = None,
) -> None:
    """Runs one rank's pipeline on one thread a stream.

    seed, max_delay: every step sleeps a random time of up to max_delay seconds before it touches
    anything, and again while it holds its regions. mailbox: that of the pipeline's link, if it has
    one, which then hears of failures. Raises the first error of any stream: RaceError, TimeoutError,
    or what an action raised.
    """
    failed = threading.Event() if mailbox is None else mailbox.failed
    schedule = pipeline.schedule
    ended = {step.name: threading.Event() for step in schedule.steps}
    failures: list[BaseException] = []
    watch = _Watch(schedule.rank)
    _poison_temporaries(pipeline)

    def run_stream(stream: str) -> None:
        rng = random.Random(f"{seed}/{schedule.rank}/{stream}")
        try:
            for step in schedule.steps:
                if step.stream == stream:
                    _run_step(pipeline, step, ended, watch, rng, max_delay, timeout, failed)
        except BaseException as error:
            failures.append(error)
            failed.set()
            if mailbox is not None:
                mailbox.fail()

    threads = [threading.Thread(target=run_stream, args=(s,), daemon=True) for s in STREAMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run_ranks(
    pipelines: Sequence[Pipeline],
    mailbox: Mailbox,
    *,
    seed: int,
    max_delay: float,
    calls: int = 1,
) -> None:
    """Runs all ranks as threads of this process; raises the first failure.

    mailbox: what the pipelines' links were made from. calls: how many times in a row each rank runs
    its pipeline; a rank that is done with one call does not wait for the others to be.
    """
    failures: list[BaseException] = []

    def run(pipeline: Pipeline) -> None:
        try:
            for call in range(calls):
                run_rank(pipeline, seed=seed + call, max_delay=max_delay, mailbox=mailbox)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(p,), daemon=True) for p in pipelines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A race on one rank makes others time out; the race is the news.
    failures.sort(key=lambda error: isinstance(error, TimeoutError))
    if failures:
        raise failures[0]


def _run_step(
    pipeline: Pipeline,
    step: Step,
    ended: dict[str, threading.Event],
    watch: _Watch,
    rng: random.Random,
    max_delay: float,
    timeout: float,
    failed: threading.Event,
) -> None:
    deadline = time.monotonic() + timeout
    for name in step.waits:
        while not ended[name].wait(0.05):
            if failed.is_set() or time.monotonic() > deadline:
                raise TimeoutError(f"{step.name!r} waited in vain for {name!r}")
    time.sleep(rng.random() * max_delay)
    watch.enter(step)
    receives = step.is_exchange or step.pull_from >= 0
    if receives or step.action in ("gather_all", "reduce_scatter_all"):
        for region in step.writes:
            _view(pipeline, region).fill_(torch.nan)
    before = [_view(pipeline, region).clone() for region in step.reads]
    time.sleep(rng.random() * max_delay)
    pipeline.actions[step.action](step)
    for region, old in zip(step.reads, before, strict=True):
        if region not in step.writes and not same_bits(_view(pipeline, region), old):
            raise RaceError(f"{step.name!r}: {region} changed while it was being read")
    watch.leave(step)
    ended[step.name].set()


def _view(pipeline: Pipeline, region: Region) -> Tensor:
    name, *indices = region
    return pipeline.views[str(name)](*indices)


def _poison_temporaries(pipeline: Pipeline) -> None:
    given = set(pipeline.schedule.inputs)
    for step in pipeline.schedule.steps:
        for region in step.writes:
            if region not in given:
                _view(pipeline, region).fill_(torch.nan)
