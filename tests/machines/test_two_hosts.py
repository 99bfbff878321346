"""Two hosts, as network namespaces joined by a link: the same bits as on one, and a link that is cut."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pyparallel.launch import launch
from tests.machines.hosts import Hosts
from tests.machines.job import TIMEOUT_S, same
from tests.machines.waiting import wait_for

RANKS = range(4)


def test_two_hosts_give_the_bits_of_one(hosts: Hosts, tmp_path: Path) -> None:
    for process in hosts.torchrun(2, "tests.machines.job", "same", str(tmp_path)):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    alone = launch(same, len(RANKS), threads=1)
    for rank in RANKS:
        found = json.loads((tmp_path / str(rank)).read_text())
        engines = [mesh[0] for mesh in found]
        assert engines == [
            ["SharedMemoryCommunicator", "TorchCommunicator"],
            ["HierarchicalCommunicator", "LocalCommunicator"],
        ]
        assert [mesh[1] for mesh in found] == [mesh[1] for mesh in alone[rank]]


# It waits for timeouts, which other tests hold the engines to in less time.
@pytest.mark.slow
def test_a_link_that_is_cut_ends_every_rank_inside_the_timeout(
    hosts: Hosts, tmp_path: Path
) -> None:
    started = hosts.torchrun(2, "tests.machines.job", "cut", str(tmp_path))
    wait_for((tmp_path / "under way").exists, 200)
    hosts.cut()
    cut_at = time.time()
    wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in RANKS), TIMEOUT_S + 20)
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in RANKS]
    across = [rank for rank in RANKS if "on group 'dp'" in told[rank]["error"]]
    assert across, told
    for rank, last in enumerate(told):
        # The roll call takes up to two seconds more.
        assert last["at"] - cut_at < TIMEOUT_S + 4, last
        if rank in across:
            assert f"missing ranks: {1 - rank // 2} " in last["error"], last
        else:
            # The link carried its last sum, but not its neighbour's, for whom it waits in the next step.
            assert rank ^ 1 in across, told
            assert "on group 'tp'" in last["error"], last
            assert "alive, but stuck or elsewhere" in last["error"], last
        wait_for(lambda: has_ended(last["process"]), 20)  # noqa: B023
    # The store is on the first host. torchrun on the other asks for it for minutes, without ranks.
    output, _ = started[0].communicate(timeout=60)
    assert started[0].returncode != 0, output


@pytest.mark.slow
def test_a_killed_rank_is_told_in_under_five_seconds(hosts: Hosts, tmp_path: Path) -> None:
    hosts.ranks(2, "tests.machines.job", "kill", str(tmp_path))
    wait_for((tmp_path / "under way").exists, 200)
    os.kill(int((tmp_path / "process 3").read_text()), signal.SIGKILL)
    killed_at = time.time()
    left = [0, 1, 2]
    wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in left), 30)
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in left]
    assert all(last["at"] - killed_at < 5 for last in told), told
    # Its neighbours in both groups; the last one hears of one of those.
    assert "missing ranks: 1 " in told[1]["error"] or "rank 1 died" in told[2]["error"], told


def has_ended(process: int) -> bool:
    """Gone, or waiting for torchrun to ask how it ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"
