"""all_gather_linear and linear_reduce_scatter in place, against the plain path: the same bits."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyparallel import backend
from pyparallel.comm.collectives import all_reduce_raw, count_collectives
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.launch import RankError
from pyparallel.ops.all_gather_linear import gather_then_linear
from pyparallel.ops.cpu.all_gather_linear import run as all_gather_linear
from pyparallel.ops.cpu.linear_reduce_scatter import run as linear_reduce_scatter
from pyparallel.ops.linear_reduce_scatter import linear_then_reduce_scatter
from pyparallel.testing import assert_equal, normals, run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (leading axes, S, K, M): one row a chunk and many, more features than fit a tile, odd everything.
SHAPES = (
    ((1,), 64, 96, 48),
    ((2,), 130, 33, 65),
    ((3,), 5, 7, 1),
    ((), 4, 1, 3),
    ((2, 2), 24, 16, 40),
    ((0,), 8, 4, 4),
    ((1,), 512, 200, 300),
)


def operands(group: Group, shape, dtype: torch.dtype, seed: int):
    """x of this rank's tokens, x of its features, weights of both layers, a bias."""
    lead, s, k, m = shape
    sizes = sequence_sizes(s, group)
    rank = 1000 * (group.rank + 1) + seed
    return (
        normals(*lead, sizes[group.rank], k, seed=rank, dtype=dtype),
        normals(*lead, s, k, seed=rank + 1, dtype=dtype),
        normals(m, k, seed=rank + 2, dtype=dtype),
        normals(m, seed=seed, dtype=dtype),
        sizes,
    )


def same_bits(group: Group, shapes, dtypes=DTYPES) -> None:
    for dtype in dtypes:
        for number, shape in enumerate(shapes):
            x_tokens, x_features, weight, bias, sizes = operands(group, shape, dtype, number)
            for given_bias in (bias, None):
                what = f"{dtype} {shape} bias={given_bias is not None}"
                for x, plain, in_place in (
                    (x_tokens, gather_then_linear, all_gather_linear),
                    (x_features, linear_then_reduce_scatter, linear_reduce_scatter),
                ):
                    with count_collectives() as expected:
                        y = plain(x, weight, given_bias, group, sizes)
                    with count_collectives() as counted:
                        actual = in_place(x, weight, given_bias, group, sizes)
                    assert_equal(actual, y, f"{in_place.__module__} {what}")
                    assert counted == expected, what


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_same_bits(ranks):
    run_ranks(same_bits, ranks, SHAPES)


shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=1).map(tuple),
    st.integers(4, 70),
    st.integers(1, 150),
    st.integers(1, 150),
)


@settings(max_examples=5)
@given(ranks=st.integers(2, 4), shapes=st.lists(shapes, min_size=6, max_size=6))
def test_same_bits_of_any_shape(ranks, shapes):
    run_ranks(same_bits, ranks, shapes, DTYPES[:2])


def many_calls(group: Group) -> None:
    """Both ops and plain collectives in turn, growing and shrinking, each rank now and then late."""
    late = random.Random(group.rank)
    for number in range(60):
        shape = ((1 + number % 3,), 4 + number * 7 % 40, 1 + number % 9, 1 + number * 5 % 30)
        x_tokens, x_features, weight, bias, sizes = operands(group, shape, torch.float32, number)
        y = gather_then_linear(x_tokens, weight, bias, group, sizes)
        z = linear_then_reduce_scatter(x_features, weight, bias, group, sizes)
        if late.random() < 0.2:
            time.sleep(0.01)
        pending = all_reduce_raw(torch.ones(5), group, async_op=True)
        assert_equal(all_gather_linear(x_tokens, weight, bias, group, sizes), y, f"{number} gather")
        if late.random() < 0.2:
            time.sleep(0.01)
        assert_equal(
            linear_reduce_scatter(x_features, weight, bias, group, sizes), z, f"{number} scatter"
        )
        assert_equal(pending.wait(), torch.full((5,), float(group.size)), "all_reduce")


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_calls_with_late_ranks(ranks):
    run_ranks(many_calls, ranks)


def chosen(group: Group) -> str:
    x, _, weight, bias, sizes = operands(group, ((1,), 8, 4, 4), torch.float32, 0)
    assert backend.select("all_gather_linear", x, weight, bias, group, sizes) is all_gather_linear
    with (
        backend.use("cpu"),
        pytest.raises(backend.UnsupportedError, match=r"cpu: torch\.int8 cannot be summed"),
    ):
        backend.select("linear_reduce_scatter", x.to(torch.int8), weight, bias, group, sizes)
    with backend.use("torch"):
        # The op by its parts is what is left, each on torch.
        assert backend.offered("all_gather_linear", x, weight, bias, group, sizes) is None
    single = Group.single()
    assert backend.offered("all_gather_linear", x, weight, bias, single, [8]) is None
    with pytest.raises(backend.UnsupportedError, match=r"cpu: the group .* does not share memory"):
        backend.select("all_gather_linear", x, weight, bias, single, [8])


def test_chosen_where_ranks_share_memory():
    run_ranks(chosen, 2)


def disagree(group: Group) -> None:
    x, features, weight, bias, sizes = operands(group, ((1,), 8, 4, 4), torch.float32, 0)
    all_gather_linear(x, weight, bias, group, sizes)
    if group.rank == 0:
        all_gather_linear(x, weight, bias, group, sizes)
    else:
        linear_reduce_scatter(features[:, :, :2], weight[:1, :2], None, group, sizes)


def test_ranks_that_call_different_things_are_told():
    with pytest.raises(RankError, match=r"exchange of float32\[(32|128)\]"):
        run_ranks(disagree, 2)


def dies(group: Group, report: str) -> None:
    x, _, weight, bias, sizes = operands(group, ((1,), 8, 4, 4), torch.float32, 0)
    all_gather_linear(x, weight, bias, group, sizes)
    if group.rank == 1:
        os._exit(3)
    start = time.monotonic()
    try:
        all_gather_linear(x, weight, bias, group, sizes)
    except PeerError as error:
        Path(report).write_text(f"{error.missing} {time.monotonic() - start < 5.0}")


def test_a_dead_peer_is_noticed(tmp_path):
    report = tmp_path / "report"
    with pytest.raises(RankError, match="ended with exit status 3"):
        run_ranks(dies, 2, str(report))
    assert report.read_text() == "(1,) True"
