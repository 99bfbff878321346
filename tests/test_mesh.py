"""init_mesh(): places, wrong sizes, and the same results under launch and torchrun."""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.launch import launch
from pyparallel.mesh import AXES, init_mesh

SIZES = [sizes for sizes in itertools.product((1, 2, 4), repeat=4) if math.prod(sizes) in (2, 4)]


def places(all_sizes: list[tuple[int, ...]]) -> list:
    """Each axis's rank and who is in it, by a sum over the axis of 10^(world rank)."""
    found = []
    for sizes in all_sizes:
        mesh = init_mesh(**dict(zip(AXES, sizes, strict=True)))
        assert mesh.sizes == dict(zip(AXES, sizes, strict=True))
        groups = [mesh.world, *(getattr(mesh, axis) for axis in AXES)]
        member = torch.tensor([10**mesh.world.rank])
        found.append([(g.rank, int(all_reduce_raw(member.clone(), g))) for g in groups])
    return found


def expected_places(sizes: tuple[int, ...], rank: int) -> list:
    """tp varies fastest, dp slowest."""
    world = math.prod(sizes)
    coordinates = list(itertools.product(*map(range, sizes)))
    mine = coordinates[rank]
    groups = [(rank, sum(10**r for r in range(world)))]
    for axis in range(4):
        members = [
            r
            for r, other in enumerate(coordinates)
            if all(other[i] == mine[i] for i in range(4) if i != axis)
        ]
        groups.append((mine[axis], sum(10**r for r in members)))
    return groups


@pytest.mark.parametrize("world", [2, 4])
def test_every_shape_puts_the_ranks_in_their_places(world):
    shapes = [sizes for sizes in SIZES if math.prod(sizes) == world]
    for rank, found in enumerate(launch(places, world, shapes)):
        for sizes, place in zip(shapes, found, strict=True):
            assert place == expected_places(sizes, rank), (sizes, rank)


def test_three_ranks_along_each_axis():
    shapes = [tuple(3 if axis == i else 1 for i in range(4)) for axis in range(4)]
    for rank, found in enumerate(launch(places, 3, shapes)):
        assert found == [expected_places(sizes, rank) for sizes in shapes]


def shares_of_axes() -> list:
    mesh = init_mesh(dp=2, tp=2, shares=(6, 2))
    assert repr(mesh) == "Mesh(dp=2 x pp=1 x cp=1 x tp=2, shares=(3, 1))"
    assert repr(mesh.tp).endswith("size=2, shares=(3, 1))") and "shares" not in repr(mesh.dp)
    return [mesh.world.shares, *(getattr(mesh, axis).shares for axis in AXES)]


def test_shares_are_of_the_tp_axis():
    expected = [(1, 1, 1, 1), (1, 1), (1,), (1,), (3, 1)]
    assert launch(shares_of_axes, 4) == [expected] * 4
    assert init_mesh(shares=(7,)).tp.shares == (1,)


def wrong_shares() -> list[str]:
    rank, messages = torch.distributed.get_rank(), []
    for shares in ((2, 0), (2, 1, 1), (1, 2.0), (2, 1 + rank)):
        with pytest.raises(ValueError) as caught:
            init_mesh(tp=2, shares=shares)
        messages.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        init_mesh(tp=2, shares=(2, 1) if rank else None)
    return [*messages, str(caught.value)]


def test_wrong_shares_are_clear_errors_on_every_rank():
    way = "give every rank the first one's"
    for messages in launch(wrong_shares, 2):
        assert messages == [
            "shares of rank 1: expected at least 1, got 0",
            "shares: expected 2, one for each rank of tp=2, got 3",
            "shares of rank 1: expected an integer, got 2.0",
            f"shares: expected the same on all ranks, got (2, 1) on rank 0 and (1, 1) on rank 1; {way}",
            f"shares: expected the same on all ranks, got (1, 1) on rank 0 and (2, 1) on rank 1; {way}",
        ]


def wrong_sizes() -> list[str]:
    messages = []
    for sizes in ({"tp": 3}, {"dp": 2, "tp": 2}, {}, {"cp": 0, "tp": 2}, {"pp": -1}):
        with pytest.raises(ValueError) as caught:
            init_mesh(**sizes)
        messages.append(str(caught.value))
    return messages


def test_wrong_sizes_are_clear_errors():
    for messages in launch(wrong_sizes, 2):
        assert messages == [
            "mesh: dp=1 x pp=1 x cp=1 x tp=3 = 3 ranks, but the world has 2; "
            "start 3 ranks or choose sizes whose product is 2",
            "mesh: dp=2 x pp=1 x cp=1 x tp=2 = 4 ranks, but the world has 2; "
            "start 4 ranks or choose sizes whose product is 2",
            "mesh: dp=1 x pp=1 x cp=1 x tp=1 = 1 ranks, but the world has 2; "
            "start 1 ranks or choose sizes whose product is 2",
            "cp: expected at least 1 rank, got 0",
            "pp: expected at least 1 rank, got -1",
        ]


def clean_environment(**more: str) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    root = str(Path(__file__).parents[1])
    return {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def test_a_single_process_needs_no_launcher():
    script = """
from pyparallel.mesh import init_mesh
mesh = init_mesh()
print(mesh, mesh.tp.size)
try:
    init_mesh(tp=2)
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Mesh(dp=1 x pp=1 x cp=1 x tp=1) 1"
    assert lines[1].startswith("mesh: dp=1 x pp=1 x cp=1 x tp=2 = 2 ranks, but the world has 1")


def same_anywhere() -> list:
    """A layer's output and gradient on a dp x tp mesh."""
    from pyparallel.layers import ColumnParallelLinear, RowParallelLinear

    mesh = init_mesh(dp=2, tp=2)
    torch.manual_seed(0)
    up = ColumnParallelLinear(5, 7, group=mesh.tp)
    down = RowParallelLinear(7, 3, group=mesh.tp)
    x = (torch.arange(20.0).view(4, 5) * (mesh.dp.rank + 1)).requires_grad_()
    y = down(up(x))
    y.square().sum().backward()
    total = all_reduce_raw(up.weight.grad.sum().view(1), mesh.world)
    return [y.flatten().tolist(), x.grad.flatten().tolist(), total.tolist()]


def test_torchrun_gives_what_launch_gives(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.test_mesh import same_anywhere\n"
        "path = os.path.join(sys.argv[1], os.environ['RANK'])\n"
        "json.dump(same_anywhere(), open(path, 'w'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command += ["--master-addr", "127.0.0.1", "--master-port", port, str(script), str(tmp_path)]
    done = subprocess.run(
        command,
        env=clean_environment(GLOO_SOCKET_IFNAME="lo"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    under_torchrun = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    assert under_torchrun == launch(same_anywhere, 4)
