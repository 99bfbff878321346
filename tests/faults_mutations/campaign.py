"""Runs mutations in worker processes, and counts what came of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# For one mutation; most take some hundredths of a second.
SECONDS = 30.0
START_SECONDS = 300.0
GOOD = ("refused", "equal", "another")
VERDICTS = (*GOOD, "wrong", "raised", "hung", "crashed")


@dataclass(frozen=True)
class Row:
    """One mutation and its verdict; see the package."""

    seed: int
    files: str
    what: str
    verdict: str
    detail: str
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.verdict in GOOD


@dataclass
class _Worker:
    """A process that answers seeds, started anew when it is lost."""

    folder: str
    process: subprocess.Popen | None = None
    _rest: bytes = field(default=b"", init=False)

    def ask(self, seed: int) -> Row:
        if self.process is None:
            self._start()
        begin = time.monotonic()
        try:
            self.process.stdin.write(f"{seed}\n".encode())
            self.process.stdin.flush()
            line = self._line(SECONDS)
        except BrokenPipeError:
            line = b""
        seconds = time.monotonic() - begin
        if line:
            return Row(**json.loads(line), seconds=seconds)
        verdict = "hung" if line is None else "crashed"
        code = self.stop()
        return Row(seed, "", "", verdict, f"exit code {code}" if line == b"" else "", seconds)

    def _start(self) -> None:
        environment = {**os.environ, "TMPDIR": self.folder, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults_mutations.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._rest = b""
        if self._line(START_SECONDS) != b"ready":
            raise RuntimeError(f"the worker did not start: exit code {self.stop()}")

    def _line(self, seconds: float) -> bytes | None:
        """A line; b"" where the process ended, None where none came in time."""
        end = time.monotonic() + seconds
        output = self.process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([output], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(output, 1 << 16)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def stop(self) -> int | None:
        if self.process is None:
            return None
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        code = self.process.wait()
        self.process = None
        return code


def campaign(seed: int, count: int, *, workers: int = 1) -> list[Row]:
    """Mutations ``seed`` to ``seed + count - 1``, in order; each is the same on every machine.

    Args:
        workers: processes side by side.
    """
    return judged(range(seed, seed + count), workers=workers)


def judged(seeds: Sequence[int], *, workers: int = 1) -> list[Row]:
    """The rows of these mutations."""
    rows: dict[int, Row] = {}
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory() as folder:

        def run(share: Sequence[int]) -> None:
            worker = _Worker(folder)
            try:
                for each in share:
                    rows[each] = worker.ask(each)
            except Exception as error:
                failures.append(error)
            finally:
                worker.stop()

        threads = [
            threading.Thread(target=run, args=(seeds[part::workers],)) for part in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [rows[each] for each in sorted(rows)]


def failed(rows: list[Row]) -> list[Row]:
    """The rows that must not be."""
    return [row for row in rows if not row.is_good]


def table(rows: list[Row]) -> str:
    """Counts by files and verdict, and the slowest."""
    counts = Counter((row.files, row.verdict) for row in rows)
    names = sorted({row.files for row in rows})
    width = max(map(len, [*names, "files"]))
    lines = [f"{'files':{width}} " + " ".join(f"{verdict:>8}" for verdict in VERDICTS)]
    for name in [*names, "all"]:
        cells = [
            sum(
                n
                for (files, kind), n in counts.items()
                if kind == verdict and name in (files, "all")
            )
            for verdict in VERDICTS
        ]
        lines.append(f"{name:{width}} " + " ".join(f"{cell:8}" for cell in cells))
    slowest = max(rows, key=lambda row: row.seconds)
    lines.append(
        f"{len(rows)} mutations, the slowest {slowest.seconds:.2f} s (seed {slowest.seed}, "
        f"{slowest.files}, {slowest.what}: {slowest.verdict})"
    )
    return "\n".join(lines)
