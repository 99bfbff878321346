"""The end of a script that torchrun started: what it has sent arrives, or somebody is told, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.comm.ending_script import LATE_S, TIMEOUT_S

ROOT = Path(__file__).parents[2]


def test_a_message_on_its_way_arrives_and_one_that_nobody_takes_is_told(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.comm.ending_script", str(tmp_path)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "arrived").exists() and ranks[1].poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        arrived_at = time.monotonic()
        told = ranks[0].communicate(timeout=30)[1]
        # The message, what is left of its group's timeout, and the end of an interpreter with torch.
        assert time.monotonic() - arrived_at < TIMEOUT_S - LATE_S + 8
        (tmp_path / "sender ended").touch()
        others = ranks[1].communicate(timeout=30)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert (tmp_path / "arrived").exists(), others
    assert (tmp_path / "arrived").read_text() == "True"
    lines = [line for line in told.splitlines() if line.startswith("pyparallel: ")]
    assert len(lines) == 1, told
    assert "a message was not delivered: send on group 'tp' (rank 0 of 2" in lines[0]
    assert [rank.returncode for rank in ranks] == [0, 0], told + others
