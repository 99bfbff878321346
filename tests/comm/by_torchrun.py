"""A script on ranks that torch's variables describe, as torchrun starts it; a rank may end alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def ranks_of(module: str, *args: str, size: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """``python -m module *args`` on each rank; none is left afterwards."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(size):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *args],
                    cwd=ROOT,
                    env={**os.environ, **world, **more, "RANK": str(rank)},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()
