"""The model that prices schedules: exact where it can be worked out by hand, monotone elsewhere."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pyparallel.overlap import SCHEDULES, report
from pyparallel.overlap.predict import (
    CANDIDATES,
    LIBRARY_CANDIDATES,
    OPERATIONS,
    PiecesTable,
    choose_pieces,
    predict,
    timeline,
    workload,
)
from pyparallel.overlap.schedule import COMMUNICATION, COMPUTE
from pyparallel.overlap.timing import H100, Machine, Workload, matmul_seconds, simulate

# One multiprocessor, 1 flop/s, one row or column a tile, 1 byte/s: every figure is a small integer.
TOY = Machine(
    name="toy",
    peak=1.0,
    efficiency=1.0,
    multiprocessors=1,
    link=1.0,
    memory=1e30,
    latency=0.0,
    launch=0.0,
    communication_sms=0,
    tiles=((1, 1, 1.0),),
)


def toy_work(rows: tuple[int, ...], *, k: int = 1, n: int = 1, moved: int = 1) -> Workload:
    return Workload(rows=rows, k=k, n=n, moved_columns=moved, element=1)


def test_all_gather_linear_by_hand() -> None:
    """2 ranks, 4 rows each: 2 s a row of matmul, 1 s a row of link. The link hides but for nothing."""
    schedules = [SCHEDULES["all_gather_linear"](rank=r, size=2, pieces=1) for r in range(2)]
    result = simulate(schedules, toy_work((4, 4)), TOY)
    # Own rows 0..8, foreign rows land at 4 and are multiplied 8..16.
    assert result.total == 16
    plain = [SCHEDULES["all_gather_linear"](rank=r, size=2, pieces=0) for r in range(2)]
    # 4 s of link, then 16 s of matmul.
    assert simulate(plain, toy_work((4, 4)), TOY).total == 20


def test_slow_link_is_exposed_by_hand() -> None:
    """At 4 s a row of link the foreign rows land at 16, two pieces at 8 and 16."""
    work = toy_work((4, 4), moved=4)
    one = [SCHEDULES["all_gather_linear"](rank=r, size=2, pieces=1) for r in range(2)]
    two = [SCHEDULES["all_gather_linear"](rank=r, size=2, pieces=2) for r in range(2)]
    assert simulate(one, work, TOY).total == 16 + 8
    assert simulate(two, work, TOY).total == 16 + 4


def test_linear_reduce_scatter_by_hand() -> None:
    """Remote rows are multiplied 0..8 and travel 8..12 while the own ones are multiplied."""
    schedules = [SCHEDULES["linear_reduce_scatter"](rank=r, size=2, pieces=1) for r in range(2)]
    assert simulate(schedules, toy_work((4, 4)), TOY).total == 16
    slow = simulate(schedules, toy_work((4, 4), moved=3), TOY)
    assert slow.total == 8 + 12


def test_two_streams_fill_the_last_wave() -> None:
    """Matmuls of 3 tiles on 2 multiprocessors: alone 2 waves each, on two streams 3 waves for two."""
    machine = replace(TOY, multiprocessors=2, peak=2.0)
    schedules = [SCHEDULES["all_gather_linear"](rank=0, size=2, pieces=1)]
    free_link = replace(machine, link=1e30)
    assert simulate(schedules, toy_work((3, 3)), free_link).total == 6
    assert matmul_seconds(machine, 3, 1, 1) == 4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_streams_run_one_step_at_a_time(name: str, pieces: int) -> None:
    size = 4
    schedules = [SCHEDULES[name](rank=r, size=size, pieces=pieces) for r in range(size)]
    result = simulate(schedules, Workload((300, 200, 100, 7), 64, 96, 64), H100)
    for rank in range(size):
        for stream in (*COMPUTE, COMMUNICATION):
            spans = [s for s in result.spans if s.rank == rank and s.stream == stream]
            for earlier, later in itertools.pairwise(spans):
                assert later.start >= earlier.end - 1e-12
    names = {s.name for s in schedules[0].steps} - {"fork", "join"}
    assert {s.name for s in result.spans if s.rank == 0} == names


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_rank_stands_for_equal_ranks(operation: str) -> None:
    shape = {"m": 2048, "k": 1024, "n": 896, "size": 4, "pieces": 2}
    every = timeline(operation, **shape).total
    alone = predict(operation, **shape).total
    assert alone == pytest.approx(every, rel=1e-9)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m", [8, 64, 512, 1024, 4096, 16384])
def test_the_choice_never_loses_to_the_plain_path(operation: str, m: int) -> None:
    k, n = (8192, 3584) if operation == "all_gather_linear" else (3584, 8192)
    for candidates in (CANDIDATES, LIBRARY_CANDIDATES):
        pieces = choose_pieces(operation, m=m, k=k, n=n, size=8, candidates=candidates)
        assert pieces in candidates
        chosen = predict(operation, m=m, k=k, n=n, size=8, pieces=pieces)
        assert chosen.total <= chosen.plain
        # Bounds no schedule beats: the matmul alone, and the link alone.
        work = workload(operation, m=m, k=k, n=n, size=8)
        moved = (m - max(work.rows)) * work.moved_columns * work.element / H100.link
        assert chosen.total >= moved
    if m <= 64:
        assert pieces == 0


def test_large_m_overlaps() -> None:
    p = predict("all_gather_linear", m=16384, k=8192, n=3584, size=8, pieces=1)
    assert 0.6 < p.hidden <= 1.0 and p.total < p.plain


def test_measured_table_comes_first(tmp_path: Path) -> None:
    entry = {"operation": "all_gather_linear", "size": 8, "m": 4096, "k": 8192, "n": 3584}
    path = tmp_path / "pieces.json"
    path.write_text(json.dumps([{**entry, "seconds": {"0": 3e-4, "1": 4e-4, "4": 2e-4}}]))
    shape = {"m": 4096, "k": 8192, "n": 3584, "size": 8}
    assert PiecesTable().pieces("all_gather_linear", **shape) == 1
    assert PiecesTable(path).pieces("all_gather_linear", **shape) == 4
    # Measured with more pieces than a library's matmul may have: the plain path was faster than 1.
    library = PiecesTable(path, candidates=LIBRARY_CANDIDATES)
    assert library.pieces("all_gather_linear", **shape) == 0


@pytest.mark.parametrize(
    "entry", [{"operation": "all_gather_linear"}, [], {"seconds": 3}], ids=["short", "list", "odd"]
)
def test_bad_measurements_are_named(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "pieces.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="entry 0: expected operation, size"):
        PiecesTable(path)


def test_measurements_without_the_plain_path_are_refused(tmp_path: Path) -> None:
    entry = {"operation": "all_gather_linear", "size": 8, "m": 8, "k": 8, "n": 8}
    path = tmp_path / "pieces.json"
    path.write_text(json.dumps([{**entry, "seconds": {"1": 1e-4}}]))
    with pytest.raises(ValueError, match="0 pieces"):
        PiecesTable(path)


def test_unknown_operation() -> None:
    with pytest.raises(ValueError, match="operation: expected one of"):
        workload("all_reduce", m=1, k=1, n=1, size=1)


def test_report_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    speeds = ["--tflops", "312", "--link", "300", "--ranks", "4"]
    shape = ["--hidden", "1024", "--features", "2816", "--rows", "256", "4096"]
    assert report.main([*speeds, *shape, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "312 TFLOP/s x 70%, 300 GB/s a GPU each way, tp 4"
    assert sum(line.startswith("| `all_gather_linear`") for line in lines) == 4
    for name in ("all_gather_linear", "linear_reduce_scatter", "hidden"):
        root = ElementTree.parse(tmp_path / f"overlap_{name}.svg").getroot()
        assert len(root) > 10
    with pytest.raises(SystemExit):
        report.main(["--link", "0"])


def test_a_faster_link_exposes_less() -> None:
    shape = {"m": 4096, "k": 8192, "n": 3584, "size": 8, "pieces": 1}
    slow = predict("all_gather_linear", **shape, machine=replace(H100, link=5e10))
    fast = predict("all_gather_linear", **shape, machine=H100)
    assert slow.exposed > fast.exposed > 0
