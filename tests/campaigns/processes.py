"""Faults of processes at random points of what ranks do: who is named, how soon, and what is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pyparallel.checkpoint.sharded import INDEX, ShardedCheckpoint
from pyparallel.launch import RankError, launch
from pyparallel.ranks.process import state_of
from tests.campaigns.phases import PHASES, WHILE_S, work
from tests.campaigns.rows import Row
from tests.transformers_models import build

FAULTS = ("kill", "stop", "signal", "cut", "full", "forked")
# What a collective may wait, and a rank be stopped.
TIMEOUT_S = 1.0
# Nothing may take longer, on a machine that does other things too.
HUNG_S = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGQUIT)


def campaign(seed: int, count: int) -> list[Row]:
    """``count`` launches of two or three ranks with a fault each; the same of the same seed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        build("llama").save_pretrained(folder)
        launch(work, 2, "save", str(folder), place, {}, seed, 0.0, threads=1)
        return [_one(seed, number, folder, Path(place)) for number in range(count)]


def _one(seed: int, number: int, folder: Path, place: Path) -> Row:
    """A fault, drawn from seed and number."""
    rng = random.Random(f"{seed}/{number}")
    phase = PHASES[number % len(PHASES)]
    fault = rng.choice([f for f in FAULTS if f != "full" or phase in ("save", "export")])
    if phase == "start-up" and fault in ("cut", "forked"):
        fault = "kill"
    size = rng.choice((2, 2, 3))
    victim = rng.randrange(size)
    how = _Injection(fault, phase, size, victim, rng)
    own = {victim: fault} if fault in ("cut", "full", "forked") else {}
    message, named, results = "", None, []
    with how.watching():
        try:
            results = launch(
                work,
                size,
                *(phase, str(folder), str(place), own, rng.randrange(2**31), WHILE_S),
                threads=1,
                timeout_s=TIMEOUT_S if fault in ("stop", "cut") else 60.0,
                on_report=how.reported,
            )
        except RankError as error:
            message, named = str(error).splitlines()[0], error.rank
        ended = time.monotonic()
    took = ended - how.at if how.at else 0.0
    # Nobody misses a rank that has told its result.
    came_late = results == ["done"] * size
    verdict = "ok" if came_late else _verdict(fault, message, named, victim, took)
    if how.left():
        verdict = "left"
    if not _whole(place / "good"):
        verdict = "lost"
    ends, seconds = "", 0.0
    if came_late:
        how.at = 0.0
    if fault in ("kill", "signal", "forked") and how.at:
        ends, seconds = "death", took
    elif fault == "stop" and how.at:
        ends, seconds = "stop", max(0.0, took - TIMEOUT_S)
    detail = (
        f"fault {number} of seed {seed}, rank {victim} of {size}: {message[:160] or 'no error'}"
    )
    return Row("processes", phase, fault, verdict, ends, seconds, detail)


def _verdict(fault: str, message: str, named: int | None, victim: int, took: float) -> str:
    if took > HUNG_S:
        return "hung"
    if fault in ("cut", "full"):
        # It may have hit what is not used any more.
        return "ok" if len(message) < 2000 else "wrong"
    return "ok" if named == victim else "wrong"


def _whole(folder: Path) -> bool:
    """Whether the checkpoint that was there, or a newer one, can be read."""
    try:
        return (folder / INDEX).exists() and bool(ShardedCheckpoint(folder).shapes)
    except ValueError:
        return False


class _Injection:
    """Injects one fault at a random moment, and sees what it left."""

    def __init__(self, fault: str, phase: str, size: int, victim: int, rng: random.Random) -> None:
        self.fault, self.phase, self.size, self.victim = fault, phase, size, victim
        self.delay = rng.random() * (0.08 if phase == "start-up" else 0.15)
        self.signal = rng.choice(SIGNALS) if fault == "signal" else signal.SIGKILL
        self.at = 0.0
        self.pids: dict[int, int] = {}
        self._forked: list[int] = []
        self._before = _entries()
        self._over = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = None
        if self.phase == "start-up" and self.fault in ("kill", "stop", "signal"):
            thread = threading.Thread(target=self._in_start_up, daemon=True)
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            if thread is not None:
                thread.join()

    def _in_start_up(self) -> None:
        """Hit the victim as soon as it is there, and a little later."""
        parent = psutil.Process()
        known = {p.pid for p in parent.children(recursive=True)}
        while not self._over.is_set():
            new = sorted(p.pid for p in parent.children(recursive=True) if p.pid not in known)
            if len(new) > self.victim:
                time.sleep(self.delay)
                self._hit(new[self.victim])
                return
            time.sleep(0.001)

    def reported(self, rank: int, told: tuple[int, int | None]) -> None:
        self.pids[rank], forked = told
        if forked is not None:
            self._forked.append(forked)
        if (
            len(self.pids) == self.size
            and self.phase != "start-up"
            and self.fault not in ("cut", "full")
        ):
            threading.Timer(self.delay, self._hit, [self.pids[self.victim]]).start()

    def _hit(self, pid: int) -> None:
        number = signal.SIGSTOP if self.fault == "stop" else self.signal
        with contextlib.suppress(ProcessLookupError):
            self.at = time.monotonic()
            os.kill(pid, number)

    def left(self) -> list[str]:
        """Processes and names that are there still, a moment after the end."""
        deadline = time.monotonic() + 2.0
        while True:
            pids = [*self.pids.values(), *self._forked]
            alive = [f"process {pid}" for pid in pids if state_of(pid) not in ("", "Z", "X")]
            found = [*alive, *sorted(_entries() - self._before)]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.01)


def _entries() -> set[str]:
    shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    return {name for name in shared if "pyparallel" in name}
