"""The end of a script that torchrun started: what it has sent arrives, or somebody is told, in time."""

from __future__ import annotations

import time
from pathlib import Path

from tests.comm.by_torchrun import ranks_of
from tests.comm.ending_script import LATE_S, TIMEOUT_S


def test_a_message_on_its_way_arrives_and_one_that_nobody_takes_is_told(tmp_path: Path) -> None:
    with ranks_of("tests.comm.ending_script", str(tmp_path)) as ranks:
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
    assert (tmp_path / "arrived").exists(), others
    assert (tmp_path / "arrived").read_text() == "True"
    lines = [line for line in told.splitlines() if line.startswith("pyparallel: ")]
    assert len(lines) == 1, told
    assert "a message was not delivered: send on group 'tp' (rank 0 of 2" in lines[0]
    assert [rank.returncode for rank in ranks] == [0, 0], told + others
