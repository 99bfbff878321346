"""What a collective costs: anchors by hand, measured points, and what must grow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench.planner.fit_communication import fit_alpha_beta
from pyparallel.planner.communication import OPS, collective_seconds
from pyparallel.planner.hardware import Link, cluster_of

H100 = cluster_of("h100", 64)
# 1 us a message, 100 GB/s; no measurement is of a link of this name.
LINK = Link("a link of one's own", 1e-6, 100e9)
OWN = replace(H100, intra=LINK, inter=Link("a network of one's own", 10e-6, 10e9))


def test_an_unmeasured_link_by_hand() -> None:
    # 0.4 x 6 messages; 2 x 3/4 MB at 0.7 of 100 GB/s.
    expected = 2.4e-6 + 1.5e6 / 70e9
    assert collective_seconds("all_reduce", 1e6, 4, OWN) == pytest.approx(expected)
    # A gather moves half of what a reduction does.
    expected = 2.4e-6 + 0.75e6 / 70e9
    assert collective_seconds("all_gather", 1e6, 4, OWN) == pytest.approx(expected)


def test_a_message_by_hand() -> None:
    assert collective_seconds("send", 1e6, 2, OWN) == pytest.approx(1e-6 + 1e6 / 80e9)
    across = collective_seconds("send", 1e6, 2, OWN, ranks_per_node=1)
    assert across == pytest.approx(10e-6 + 1e6 / 8e9)


def test_one_rank_a_node_by_hand() -> None:
    # 4 nodes: 4 x 2 messages; 2 x 3/4 MB at 0.8 of 10 GB/s.
    expected = 8 * 10e-6 + 1.5e6 / 8e9
    assert collective_seconds("all_reduce", 1e6, 4, OWN, ranks_per_node=1) == pytest.approx(
        expected
    )


def test_pairs_of_links_add_up() -> None:
    pairs = replace(OWN, intra=replace(LINK, per_peer=True))
    both = [collective_seconds("all_reduce", 1e9, 8, cluster) for cluster in (OWN, pairs)]
    # 7 peers at once; the messages are nothing beside 1 GB.
    assert both[0] / both[1] == pytest.approx(7, rel=1e-3)


def test_a_measured_size_is_its_measurement() -> None:
    # comm_nccl_nvlink_by_system: all_reduce of 2 MiB by 8 H100, 38.18 us; 512 KiB, 20.13 us.
    measured = collective_seconds("all_reduce", 2 << 20, 8, H100)
    assert measured == pytest.approx(38.18e-6)
    between = collective_seconds("all_reduce", 1 << 20, 8, H100)
    assert between == pytest.approx(math.sqrt(38.18e-6 * 20.13e-6))


def test_beyond_the_largest_size_bytes_count() -> None:
    once, twice = (collective_seconds("all_reduce", n << 30, 8, H100) for n in (1, 2))
    assert twice == pytest.approx(2 * once)


def test_a_group_that_was_not_measured_lies_beside_one_that_was() -> None:
    two, three, four = (collective_seconds("all_reduce", 1e7, ranks, H100) for ranks in (2, 3, 4))
    assert two < three
    assert abs(three / four - 1) < 0.2


@pytest.mark.parametrize("op", OPS)
def test_more_bytes_take_longer(op: str) -> None:
    for ranks in (2, 8, 16, 64):
        times = [collective_seconds(op, 4.0**power * 512, ranks, OWN) for power in range(12)]
        assert times == sorted(set(times))


@pytest.mark.parametrize("op", [op for op in OPS if op != "send"])
def test_another_node_costs_at_least_its_bytes(op: str) -> None:
    one, two = (collective_seconds(op, 1e8, ranks, OWN) for ranks in (8, 16))
    assert two > one
    assert two > 1e8 / 2 / 8 / 10e9


def test_a_faster_kernel_where_one_was_measured() -> None:
    sizes = (8192, 65536)
    for size in sizes:
        graph = collective_seconds("all_reduce", size, 8, H100, kernel="vllm_graph")
        assert graph < collective_seconds("all_reduce", size, 8, H100)
    # Only all_reduce has kernels; NCCL's stands in elsewhere.
    gather = collective_seconds("all_gather", 1e6, 8, H100, kernel="trtllm")
    assert gather == collective_seconds("all_gather", 1e6, 8, H100)


def test_nothing_costs_nothing() -> None:
    assert collective_seconds("all_reduce", 1e6, 1, H100) == 0
    assert collective_seconds("all_reduce", 0, 8, H100) == 0


@pytest.mark.parametrize(
    ("op", "num_bytes", "ranks", "message"),
    [
        ("allreduce", 1, 2, "op: expected one of all_reduce"),
        ("send", -1, 2, "at least 1 rank and 0 bytes, got 2 and -1"),
        ("send", 1, 0, "got 0 and 1"),
    ],
)
def test_what_is_refused(op: str, num_bytes: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collective_seconds(op, num_bytes, ranks, H100)


def test_the_fit_finds_a_line() -> None:
    points = [(size, 5.0 + size / 2e5) for size in (65536, 1 << 20, 1 << 24, 1 << 28)]
    alpha, beta = fit_alpha_beta(points)
    # The second grid's steps are 2 log(1.15) / 80.
    assert alpha == pytest.approx(5.0, rel=0.004)
    assert beta == pytest.approx(2e5, rel=0.004)
