"""A script that just ends has delivered what it sent, on links that are slower than its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machines.ends import LAST
from tests.machines.hosts import Hosts


# tests/comm/test_ending_script.py holds the end of one machine's scripts to it in less time.
@pytest.mark.slow
def test_what_was_sent_arrives_though_the_script_ends(hosts: Hosts, tmp_path: Path) -> None:
    hosts.slow(100)
    # torchrun's variables are all of torchrun that an end of a script depends on.
    started = hosts.ranks(2, "tests.machines.ends", str(tmp_path))
    outputs = [process.communicate(timeout=60)[0] for process in started]
    for operation in LAST:
        for rank in range(4):
            status = (tmp_path / f"{operation.__name__}-{rank}").read_text().split()[0]
            assert status == "0", (operation.__name__, rank, outputs)
