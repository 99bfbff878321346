"""One trace of all ranks: names with bytes, waiting apart from moving, clocks aligned, nothing left."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pyparallel
from pyparallel import backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.communicator import Communicator
from pyparallel.launch import RankError, launch
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.profiling.merge import TRACK, RankTrace, merge
from pyparallel.profiling.named import COLLECTIVES, Call, named, readable
from pyparallel.profiling.profile import clocks_ahead

KILOBYTE = 250


def own_functions() -> list[object]:
    return [*(getattr(Communicator, op) for op in COLLECTIVES), backend._run_of]


def traced(folder: Path) -> None:
    before = own_functions()
    mesh = init_mesh(dp=2, tp=2)
    model = nn.Sequential(
        ColumnParallelLinear.from_dense(nn.Linear(4, 6), group=mesh.tp),
        RowParallelLinear.from_dense(nn.Linear(6, 4), group=mesh.tp),
    )
    x = torch.ones(3, 4)
    wanted = model(x)
    with pyparallel.profile(folder / "deep" / "trace.json") as tracing:
        got = model(x)
        for _ in range(2):
            first = all_reduce_raw(torch.ones(KILOBYTE), mesh.dp, async_op=True)
            second = all_reduce_raw(torch.ones(2 * KILOBYTE), mesh.dp, async_op=True)
            assert (second.wait(), first.wait())[1][0] == 2
        mesh.world.communicator.barrier()
    assert torch.equal(wanted, got)
    assert any(event.key == "all_reduce dp 1 KB" for event in tracing.key_averages())
    # Outside of a profile nothing of it runs, so that it costs nothing.
    assert own_functions() == before
    with pytest.raises(ZeroDivisionError), pyparallel.profile(folder / "none.json"):
        assert own_functions() != before
        raise ZeroDivisionError
    assert own_functions() == before


def test_all_ranks_are_in_one_file(tmp_path: Path) -> None:
    launch(traced, 4, tmp_path, threads=1, timeout_s=60.0)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    (file,) = (tmp_path / "deep").iterdir()
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [processes[rank] for rank in range(4)] == [f"rank {rank}" for rank in range(4)]
    slices = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in slices) >= 0
    for rank in range(4):
        names = [event["name"] for event in slices if event["pid"] == rank]
        assert names.count("all_reduce dp 1 KB") == names.count("all_reduce dp 2 KB") == 2
        assert names.count("wait for all_reduce dp 1 KB") == 2
        assert "barrier world 0 B" in names
        assert any(name.startswith("linear [") for name in names)
        # One kernel, which talks by itself.
        assert any(name.startswith("linear_all_reduce [cpu]") for name in names)
        own = [event for event in slices if event["pid"] == rank and "last rank" in event["args"]]
        for tid in {event["tid"] for event in own}:
            track = sorted((e["ts"], e["dur"]) for e in own if e["tid"] == tid)
            # A microsecond's last bits at the age of the system's clock.
            assert all(a + b <= c + 1 for (a, b), (c, _) in itertools.pairwise(track))
    sums = {(line["rank"], line["op"], line["group"]): line for line in trace["collectives"]}
    for rank in range(4):
        assert sums[rank, "all_reduce", "dp"]["calls"] == 4
        assert sums[rank, "all_reduce", "dp"]["bytes"] == 6000
        assert sums[rank, "barrier", "world"]["calls"] == 1


def call(number: int, start: int, end: int, **changed: object) -> Call:
    given = {"op": "all_reduce", "group": "tp", "ranks": (0, 1), "num_bytes": 8, **changed}
    return Call(number=number, start_ns=start, end_ns=end, **given)


def test_a_collective_waits_for_the_last_rank_and_then_moves() -> None:
    base = {"baseTimeNanoseconds": 0}
    event = {"ph": "X", "cat": "cpu_op", "name": "add", "tid": 9, "dur": 1.0, "args": {}}
    arrow = {"ph": "s", "id": 3, "name": "ac2g", "tid": 9, "cat": "ac2g"}
    first = {"traceEvents": [{**event, "pid": 77, "ts": 10.0}, {**arrow, "pid": 77, "ts": 10.0}]}
    # Of another machine, whose clock is 1 us ahead; its GPU has the number that is a rank's.
    second = {"traceEvents": [{**event, "pid": 78, "ts": 12.0}, {**event, "pid": 0, "ts": 13.0}]}
    # Rank 1 comes 4 us later; the second call ends on rank 0 before rank 1 has begun it.
    traces = [
        RankTrace(0, 77, {**base, **first}, [call(0, 20_000, 30_000), call(1, 31_000, 33_000)], 0),
        RankTrace(
            1, 78, {**base, **second}, [call(0, 25_000, 32_000), call(1, 35_000, 37_000)], 1000
        ),
    ]
    alone = call(2, 40_000, 41_000, ranks=())
    lost = call(3, 42_000, 43_000)
    traces[0].calls.extend([alone, lost])
    merged = merge(traces)
    found = [e for e in merged["traceEvents"] if e.get("tid") == TRACK and e["ph"] == "X"]
    told = [(e["pid"], e["cat"], e["ts"], e["dur"], e["args"]["last rank"]) for e in found]
    assert sorted(told) == [
        (0, "moving", 14.0, 6.0, 1),
        (0, "waiting", 10.0, 4.0, 1),
        (0, "waiting", 21.0, 2.0, 1),
        (1, "moving", 14.0, 7.0, 1),
        (1, "moving", 24.0, 2.0, 1),
    ]
    adds = [(e["pid"], e["ts"]) for e in merged["traceEvents"] if e["name"] == "add"]
    assert adds == [(0, 0.0), (1, 1.0), (2, 2.0)]
    names = {
        e["pid"]: e["args"]["name"] for e in merged["traceEvents"] if e["name"] == "process_name"
    }
    assert names == {0: "rank 0", 1: "rank 1", 2: "rank 1: GPU 0"}
    assert [e["id"] for e in merged["traceEvents"] if e["ph"] == "s"] == ["0:3"]
    assert merged["collectives"] == [
        {"rank": 0, "op": "all_reduce", "group": "tp", "calls": 2, "bytes": 16}
        | {"waiting_ms": 0.006, "moving_ms": 0.006},
        {"rank": 1, "op": "all_reduce", "group": "tp", "calls": 2, "bytes": 16}
        | {"waiting_ms": 0.0, "moving_ms": pytest.approx(0.009)},
    ]


def test_another_machines_clock_is_aligned_and_this_ones_is_one() -> None:
    told = [
        {"host": "a", "seen": [100, 200, 300]},
        {"host": "a", "seen": [140, 260, 300]},
        {"host": "b", "seen": [1100, 1207, 1300]},
        {"host": "b", "seen": [1150, 1270, 1380]},
    ]
    assert clocks_ahead(told) == [0, 0, 1000, 1000]


def test_names_within_names_are_counted_apart(tmp_path: Path) -> None:
    communicator = pyparallel.Group.single().communicator
    with named() as outer:
        communicator.barrier()
        with named() as inner:
            communicator.all_reduce(torch.ones(2))
        communicator.barrier()
    assert [(seen.op, seen.number) for seen in outer] == [
        ("barrier", 0),
        ("all_reduce", 1),
        ("barrier", 2),
    ]
    assert [(seen.op, seen.number, seen.num_bytes) for seen in inner] == [("all_reduce", 0, 8)]
    with pyparallel.profile(tmp_path / "one.json.gz"):
        communicator.barrier()
    assert b'"barrier' in gzip.decompress((tmp_path / "one.json.gz").read_bytes())


def test_sizes_are_readable() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1 KB", 4_200_000: "4.2 MB", 10**16: "1e+04 TB"}
    assert {number: readable(number) for number in sizes} == sizes


def unwritable(folder: Path) -> None:
    init_mesh(tp=2)
    with pyparallel.profile(folder / "file" / "trace.json"):
        pass


def test_a_file_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RankError, match=r"(FileExists|NotADirectory)Error"):
        launch(unwritable, 2, tmp_path, threads=1, timeout_s=30.0)
