"""Hosts that are set up in odd ways are told apart, or told the way out, in a second or so."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from pyparallel.checkpoint.sharded import ShardedCheckpoint
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.cli import main
from pyparallel.cut.shard import REPLICATED
from pyparallel.saving.merge import merge
from tests.machines.hosts import Hosts
from tests.machines.setups import CASES

# A minute before, and half an hour; what is left is the start of ranks on a busy machine.
SOON_S = 30.0


# Ranks of two hosts start, and a mesh for each of their ways.
@pytest.mark.slow
def test_odd_hosts_work_or_are_told_the_way_out(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
    for host in range(2):
        (tmp_path / f"host-{host}").mkdir()
    started = hosts.ranks([2, 1], "tests.machines.setups", str(tmp_path))
    outputs = [process.communicate(timeout=100)[0] for process in started]
    told = {
        case.__name__: [
            json.loads((tmp_path / f"{case.__name__}-{rank}").read_text()) for rank in range(3)
        ]
        for case in CASES
    }
    for engine, machines, total, seconds in told["clones"]:
        assert (engine, machines, total) == ("HierarchicalCommunicator", [[0, 1], [2]], 6), outputs
        assert seconds < SOON_S
    for error, seconds in told["named_loopback"]:
        # The first rank that is wrong is named, to all.
        assert error.startswith(
            "rank 0: expected an address that the job's other hosts can reach, got 127.0.1.1"
        )
        assert f"(it has {hosts.links[0]} 10.77.0.1); set GLOO_SOCKET_IFNAME" in error
        assert seconds < SOON_S
    for no_folder, no_index in told["folders"]:
        assert "own/saved: rank 2 on host" in no_folder and "save(per_host=True)" in no_folder
        assert "own/saved: a part of a checkpoint on host" in no_index, no_index
    check_merge([tmp_path / f"host-{host}/saved" for host in range(2)], tmp_path)


def check_merge(parts: list[Path], folder: Path) -> None:
    """The hosts' parts are one checkpoint, and no checkpoint where one is missing."""
    with pytest.raises(CheckpointError, match=r"rank_00002_00.*: expected in one part"):
        merge(parts[:1], folder / "half")
    assert not (folder / "half").exists()
    with pytest.raises(CheckpointError, match="put them together: pyparallel merge"):
        ShardedCheckpoint(parts[0])
    assert main(["merge", *map(str, reversed(parts)), "--out", str(folder / "whole")]) == 0
    checkpoint = ShardedCheckpoint(folder / "whole")
    torch.manual_seed(0)
    dense = torch.nn.Linear(5, 8)
    for name, tensor in dense.named_parameters():
        assert torch.equal(checkpoint.read(name, REPLICATED, 0), tensor), name
    assert checkpoint.index.state["extra"] == {"step": 3}
