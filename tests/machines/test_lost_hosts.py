"""A host without power or network is named to whoever waits, long before the timeout of what waits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machines.hosts import Hosts
from tests.machines.lost import CASES
from tests.machines.waiting import wait_for
from tests.transformers_models import build

# Half an hour is what they wait for otherwise.
TOLD_WITHIN_S = 10.0


# Five jobs of four ranks, which take half a minute of CPU to start.
@pytest.mark.slow
def test_a_lost_host_is_named_within_ten_seconds(hosts: Hosts, tmp_path: Path) -> None:
    build("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    hosts.ranks(2, "tests.machines.lost", str(tmp_path))
    everyone = [(case, rank) for case in CASES for rank in range(4)]
    wait_for(lambda: all((tmp_path / f"{c}-{r}-waits").exists() for c, r in everyone), 100)
    time.sleep(1)
    hosts.cut()
    cut_at = time.time()
    waiting = [(case, rank) for case, rank in everyone if rank // 2 == CASES[case][1]]
    wait_for(lambda: all((tmp_path / f"{c}-{r}").exists() for c, r in waiting), 20)
    for case, rank in waiting:
        told = json.loads((tmp_path / f"{case}-{rank}").read_text())
        away = (
            "at 10.77.0.2 (ranks 2, 3) is lost" if rank < 2 else "at 10.77.0.1 (ranks 0, 1) is lost"
        )
        assert away in told["error"], (case, rank, told)
        assert told["at"] - cut_at < TOLD_WITHIN_S, (case, rank, told)


@pytest.mark.slow
def test_a_lost_host_is_named_to_those_who_wait_for_another(
    open_hosts: Callable[[int], Hosts], tmp_path: Path
) -> None:
    """Ranks 0 and 1 wait for rank 2, whose host lives; rank 3's is lost."""
    hosts = open_hosts(3)
    hosts.ranks([2, 1, 1], "tests.machines.lost", str(tmp_path), "all_reduce")
    wait_for(lambda: all((tmp_path / f"all_reduce-{r}-waits").exists() for r in range(4)), 100)
    time.sleep(1)
    hosts.cut(2)
    cut_at = time.time()
    wait_for(lambda: all((tmp_path / f"all_reduce-{r}").exists() for r in (0, 1)), 20)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"all_reduce-{rank}").read_text())
        assert "at 10.77.0.3 (rank 3) is lost" in told["error"], told
        assert "10.77.0.2 (" not in told["error"], told
        assert told["at"] - cut_at < TOLD_WITHIN_S, told


# It waits for longer than a loss would take to be told, twice.
@pytest.mark.slow
def test_a_rank_that_is_stopped_or_keeps_the_lock_is_no_lost_host(
    hosts: Hosts, tmp_path: Path
) -> None:
    for process in hosts.ranks(2, "tests.machines.stopped", str(tmp_path)):
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
    for rank in range(4):
        assert (tmp_path / str(rank)).read_text() == "[10.0, 10.0]"
