"""Rivals that take turns: each loads its model once in processes of its own, then waits for its turn.

A waiting rival sleeps in a read from a pipe, so it costs the one that runs nothing but its memory. A
turn's time is that of its slowest rank.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

from pyparallel.cut import huge_pages
from pyparallel.launch import launch

MODEL = Path(
    os.environ.get("PYPARALLEL_MODEL")
    or Path(__file__).parent.parent / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
)


@dataclass
class Rival:
    """``make(*args)`` runs on each of ``ranks`` ranks and returns ``turn(request) -> answer``."""

    name: str
    make: Callable[..., Callable[[Any], Any]]
    args: tuple
    ranks: int = 1
    threads: int = 1
    seconds: dict[Any, list[float]] = field(default_factory=dict)
    connections: list[Connection] = field(default_factory=list)
    thread: threading.Thread | None = None
    error: BaseException | None = None

    def turn(self, request: Any) -> tuple[float, Any]:
        """The slowest rank's seconds, and rank 0's answer."""
        try:
            for connection in self.connections:
                connection.send(request)
            answers = [connection.recv() for connection in self.connections]
        except (EOFError, ConnectionError) as gone:
            self.thread.join()
            raise self.error or gone from None
        return max(seconds for seconds, _ in answers), answers[0][1]

    def time(self, request: Any) -> None:
        self.seconds.setdefault(request, []).append(self.turn(request)[0])

    def median(self, request: Any) -> float:
        return statistics.median(self.seconds[request])

    def spread(self, request: Any) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.seconds[request], n=4)
        return (high - low) / 2 / self.median(request)


def _serve(address: str, make: Callable[..., Any], args: tuple) -> None:
    rank = torch.distributed.get_rank()
    turn = make(*args)
    with Client(address) as connection:
        connection.send(rank)
        while (request := connection.recv()) is not None:
            started = time.perf_counter()
            answer = turn(request)
            connection.send((time.perf_counter() - started, answer))


class Contest:
    """Starts rivals one after another; ends their processes when left."""

    def __init__(self, rivals: Sequence[Rival]) -> None:
        self.rivals = list(rivals)

    def __enter__(self) -> Contest:
        for rival in self.rivals:
            self._start(rival)
        return self

    def __exit__(self, *error: object) -> None:
        for rival in self.rivals:
            for connection in rival.connections:
                # One that has failed listens no more.
                with suppress(ConnectionError):
                    connection.send(None)
                connection.close()
            if rival.thread is not None:
                rival.thread.join()

    def _start(self, rival: Rival) -> None:
        listener = Listener()

        def run() -> None:
            try:
                launch(
                    _serve,
                    rival.ranks,
                    listener.address,
                    rival.make,
                    rival.args,
                    threads=rival.threads,
                )
            except BaseException as error:
                rival.error = error
                # Wakes the accept below.
                Client(listener.address).close()

        rival.thread = threading.Thread(target=run, name=rival.name, daemon=True)
        rival.thread.start()
        arrived: dict[int, Connection] = {}
        while len(arrived) < rival.ranks:
            connection = listener.accept()
            if rival.error is not None:
                raise rival.error
            arrived[connection.recv()] = connection
        rival.connections = [arrived[rank] for rank in range(rival.ranks)]
        listener.close()

    def rounds(self, request: Any, count: int) -> None:
        """Time ``count`` turns of each rival, taking turns; one more first, that does not count."""
        for rival in self.rivals:
            rival.turn(request)
        for _ in range(count):
            for rival in self.rivals:
                rival.time(request)


def read_bandwidth() -> Callable[[Any], float]:
    """A turn: bytes a second at which this machine's cores together read memory, in huge pages."""
    block = huge_pages.zeros((1 << 25,), dtype=torch.float32).fill_(1)

    def turn(request: Any) -> float:
        seconds = []
        for _ in range(9):
            started = time.perf_counter()
            block.sum()
            seconds.append(time.perf_counter() - started)
        return block.numel() * 4 / statistics.median(seconds)

    return turn


def memory() -> dict[str, int]:
    """This process's resident bytes: now, and at their peak."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_bytes": int(values["VmRSS"].split()[0]) * 1024,
        "peak_rss_bytes": int(values["VmHWM"].split()[0]) * 1024,
    }


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, versions, command, load."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    from pyparallel import _C

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import transformers

        versions["transformers"] = transformers.__version__
    except ImportError:
        pass
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else "pytest"
    compiler = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": _C.isa_in_use(),
        "load": os.getloadavg()[0],
        "versions": versions | {"g++": compiler.stdout.strip()},
        "command": " ".join([program, *sys.argv[1:]]),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, under a line that says what was measured on what."""
    about = machine()
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    print(f"\n{title}\n{about['cpu']}, {about['cores']} cores, {about['isa']}, {versions}")
    print(f"load before the run {about['load']:.1f}; {about['command']}")
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
