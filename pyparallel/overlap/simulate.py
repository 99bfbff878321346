"""Executes schedules on CPU ranks: a thread for every stream, random delays, every access watched.

What the CUDA executor leaves to the GPU happens here in the open. A region is checked, at run time,
for a second toucher while one writes it and for a change of its bytes while it is only read; buffers
start as NaN, and a receive poisons its place before anything lands there, so data that is used too
early shows in the result.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.overlap.pipelines import Pipeline
from pyparallel.overlap.schedule import STREAMS, Region, Step


class RaceError(RuntimeError):
    """Two steps touched the same region at the same time, one of them writing."""


class Mailbox:
    """The links of ranks that are threads of one process.

    A receiver copies straight out of the sender's memory, and the sender's step ends when that is
    done: the least synchronisation NCCL's point-to-point kernels give, and the longest time a send
    buffer is in use.
    """

    def __init__(self, size: int, *, timeout: float = 20.0) -> None:
        self.size = size
        self.timeout = timeout
        # Set when a rank has failed, so that the others stop waiting for it.
        self.failed = threading.Event()
        self.letters: dict[tuple[int, int], queue.Queue[tuple[Tensor, threading.Event]]] = {
            (a, b): queue.Queue() for a in range(size) for b in range(size)
        }

    def link(self, rank: int) -> MailboxLink:
        """The link of one rank."""
        return MailboxLink(self, rank)


class MailboxLink:
    """See `actions.Link`."""

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        taken = threading.Event()
        self.mailbox.letters[self.rank, send_to].put((send, taken))
        self._receive(receive, receive_from)
        self._wait(taken, send_to)

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        parts = output.split(list(rows))
        self._swap([own] * self.mailbox.size, parts)

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        self._swap(send.split(list(rows_out)), output.unbind())

    def _swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        taken = [threading.Event() for _ in sends]
        for peer, tensor in enumerate(sends):
            self.mailbox.letters[self.rank, peer].put((tensor, taken[peer]))
        for peer, tensor in enumerate(receives):
            self._receive(tensor, peer)
        for peer, event in enumerate(taken):
            self._wait(event, peer)

    def _receive(self, tensor: Tensor, peer: int) -> None:
        letters = self.mailbox.letters[peer, self.rank]
        deadline = time.monotonic() + self.mailbox.timeout
        while True:
            try:
                data, taken = letters.get(timeout=0.02)
                break
            except queue.Empty:
                self._check(deadline, f"nothing came from rank {peer}")
        tensor.copy_(data)
        taken.set()

    def _wait(self, event: threading.Event, peer: int) -> None:
        deadline = time.monotonic() + self.mailbox.timeout
        while not event.wait(0.02):
            self._check(deadline, f"rank {peer} took nothing")

    def _check(self, deadline: float, what: str) -> None:
        if self.mailbox.failed.is_set() or time.monotonic() > deadline:
            raise TimeoutError(f"rank {self.rank}: {what} in {self.mailbox.timeout} s")


class CommunicatorLink:
    """A Link over a Communicator of the project (shared memory, or torch.distributed).

    An exchange is an all-to-all with one message out and one in: every rank is in the same round,
    so no order of sends can deadlock, whatever the communicator buffers.
    """

    def __init__(self, communicator: object) -> None:
        self.communicator = communicator

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        out, into = [0] * self.communicator.size, [0] * self.communicator.size
        out[send_to], into[receive_from] = send.numel(), receive.numel()
        self.communicator.all_to_all(
            receive.view(-1), send.view(-1), output_counts=into, input_counts=out
        )

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        counts = [count * own.shape[1] for count in rows]
        self.communicator.all_gather(output.view(-1), own.view(-1), counts=counts)

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        out = [count * send.shape[1] for count in rows_out]
        into = [output[0].numel()] * self.communicator.size
        self.communicator.all_to_all(
            output.view(-1), send.view(-1), output_counts=into, input_counts=out
        )


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
    failed: threading.Event | None = None,
) -> None:
    """Runs one rank's pipeline on one thread a stream.

    seed, max_delay: every step sleeps a random time of up to max_delay seconds before it touches
    anything, and again while it holds its regions. failed: set when a stream fails; streams that see
    it set stop waiting. Raises the first error of any stream: RaceError, TimeoutError, or what an
    action raised.
    """
    failed = failed or threading.Event()
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

    threads = [threading.Thread(target=run_stream, args=(s,), daemon=True) for s in STREAMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run_ranks(
    pipelines: Sequence[Pipeline], mailbox: Mailbox, *, seed: int, max_delay: float
) -> None:
    """Runs all ranks of one call as threads of this process; raises the first failure.

    mailbox: what the pipelines' links were made from.
    """
    failures: list[BaseException] = []

    def run(pipeline: Pipeline) -> None:
        try:
            run_rank(pipeline, seed=seed, max_delay=max_delay, failed=mailbox.failed)
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
    if step.is_exchange or step.action in ("gather_all", "reduce_scatter_all"):
        for region in step.writes:
            _view(pipeline, region).fill_(torch.nan)
    before = [_view(pipeline, region).clone() for region in step.reads]
    time.sleep(rng.random() * max_delay)
    pipeline.actions[step.action](step)
    for region, old in zip(step.reads, before, strict=True):
        if region not in step.writes and not _same_bits(_view(pipeline, region), old):
            raise RaceError(f"{step.name!r}: {region} changed while it was being read")
    watch.leave(step)
    ended[step.name].set()


def _view(pipeline: Pipeline, region: Region) -> Tensor:
    name, *indices = region
    return pipeline.views[str(name)](*indices)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _poison_temporaries(pipeline: Pipeline) -> None:
    given = set(pipeline.schedule.inputs)
    for step in pipeline.schedule.steps:
        for region in step.writes:
            if region not in given:
                _view(pipeline, region).fill_(torch.nan)
