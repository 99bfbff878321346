"""The model that prices schedules: exact where it can be worked out by hand, monotone elsewhere."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.overlap import report
from pyparallel.overlap import SCHEDULES
from pyparallel.overlap.machine import H100, Machine
from pyparallel.overlap.predict import OPERATIONS, predict, predict_fused, timeline, workload
from pyparallel.overlap.schedule import COMMUNICATION, COMPUTE
from pyparallel.overlap.timing import Workload, matmul_seconds, simulate

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
    copy_latency=0.0,
    meeting=0.0,
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


def test_copies_by_hand() -> None:
    """2 ranks, 4 rows each: publish and meet cost 1 s here, the copy 4 s, and no multiprocessor."""
    machine = replace(TOY, meeting=1.0)
    build = {"size": 2, "pieces": 1, "transport": "copy"}
    schedules = [SCHEDULES["all_gather_linear"](rank=r, **build) for r in range(2)]
    # Own rows 0..8, foreign rows land at 5 and are multiplied 8..16.
    assert simulate(schedules, toy_work((4, 4)), machine).total == 16
    # At 4 s a row they land at 17.
    assert simulate(schedules, toy_work((4, 4), moved=4), machine).total == 17 + 8
    scatter = [SCHEDULES["linear_reduce_scatter"](rank=r, **build) for r in range(2)]
    # Remote rows are ready at 8, met for at 9, here at 21, read by all at 22.
    assert simulate(scatter, toy_work((4, 4), moved=3), machine).total == 22


def test_only_exchanges_hold_multiprocessors() -> None:
    """With 1 of 2 multiprocessors held by kernels that move, the matmul takes twice as long."""
    machine = replace(TOY, multiprocessors=2, peak=2.0, communication_sms=1, link=1e30)
    totals = {}
    for transport in ("direct", "copy"):
        step = {"rank": 0, "size": 2, "pieces": 1, "transport": transport}
        schedule = SCHEDULES["all_gather_linear"](**step)
        totals[transport] = simulate([schedule], toy_work((4, 4)), machine).total
    assert totals == {"direct": 16, "copy": 8}


def test_a_meeting_waits_for_the_slowest() -> None:
    """Rank 1 has 8 rows to multiply before its partial sums are there, rank 0 two."""
    build = {"size": 2, "pieces": 1, "transport": "copy"}
    schedules = [SCHEDULES["linear_reduce_scatter"](rank=r, **build) for r in range(2)]
    result = simulate(schedules, toy_work((8, 2)), TOY)
    ready = {s.rank: s.end for s in result.spans if s.name == "scatter_ready[1,0]"}
    # Rank 0 multiplies rank 1's 2 rows (4 s), rank 1 rank 0's 8 rows (16 s).
    assert ready == {0: 16, 1: 16}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("pieces", "transport"), [(0, "direct"), (1, "copy"), (3, "direct")])
def test_streams_run_one_step_at_a_time(name: str, pieces: int, transport: str) -> None:
    size = 4
    schedules = [
        SCHEDULES[name](rank=r, size=size, pieces=pieces, transport=transport) for r in range(size)
    ]
    result = simulate(schedules, Workload((300, 200, 100, 7), 64, 96, 64), H100)
    for rank in range(size):
        for stream in (*COMPUTE, COMMUNICATION):
            spans = [s for s in result.spans if s.rank == rank and s.stream == stream]
            for earlier, later in itertools.pairwise(spans):
                assert later.start >= earlier.end - 1e-12
    names = {s.name for s in schedules[0].steps} - {"fork", "join"}
    assert {s.name for s in result.spans if s.rank == 0} == names


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("transport", ["direct", "copy"])
def test_one_rank_stands_for_equal_ranks(operation: str, transport: str) -> None:
    shape = {"m": 2048, "k": 1024, "n": 896, "size": 4, "pieces": 2, "transport": transport}
    every = timeline(operation, **shape).total
    alone = predict(operation, **shape).total
    assert alone == pytest.approx(every, rel=1e-9)


def test_large_m_overlaps() -> None:
    p = predict("all_gather_linear", m=16384, k=8192, n=3584, size=8, pieces=1)
    assert 0.6 < p.hidden <= 1.0 and p.total < p.plain


def test_copy_engines_leave_the_multiprocessors_to_the_matmul() -> None:
    for operation, k, n in (
        ("all_gather_linear", 8192, 3584),
        ("linear_reduce_scatter", 3584, 8192),
    ):
        for m in (4096, 8192, 16384):
            shape = {"m": m, "k": k, "n": n, "size": 8, "pieces": 1}
            kernels = predict(operation, **shape)
            copies = predict(operation, **shape, transport="copy")
            assert copies.total < kernels.total and copies.hidden > 0.8
            assert copies.total >= copies.matmul - 1e-9


def test_the_fused_kernel_by_hand() -> None:
    """2 ranks of 2 rows, tiles of one row and column: copies and tiles share nothing here."""
    tile = ((128, 128, 1.0),)
    machine = replace(TOY, tiles=tile, multiprocessors=2, peak=2.0 * 2 * 128 * 128)
    # A tile takes 1 s; 2 blocks of rows a rank, 1 column of tiles; a row of K = 1 moves in 2 s.
    fused = predict_fused(m=512, k=1, n=128, size=2, copying_sms=1, machine=machine)
    # Own tiles 0..2; foreign blocks land at 256 and 512.
    assert fused.total == 513 and fused.matmul == 2
    fast = replace(machine, link=1e30)
    assert predict_fused(m=512, k=1, n=128, size=2, copying_sms=1, machine=fast).total == 4


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
    assert sum(line.startswith(("| 256 |", "| 4096 |")) for line in lines) == 2
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
