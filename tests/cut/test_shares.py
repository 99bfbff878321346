"""The rule of shares: sums, order, nearness to the ideal, and the equal cut it contains."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pyparallel.cut.shard import HeadLayout, even_parts, features, grain_for
from pyparallel.cut.shares import MAX_SHARE, check_shares, part_sizes, runs

shares = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(tuple)
wide_shares = st.lists(st.integers(1, MAX_SHARE), min_size=1, max_size=12).map(tuple)


@given(units=st.integers(0, 3000), shares=wide_shares)
def test_parts_sum_to_the_whole_and_a_larger_share_never_holds_less(units, shares):
    sizes = part_sizes(units, shares)
    assert len(sizes) == len(shares) and sum(sizes) == units and min(sizes) >= 0
    by_share = sorted(zip(shares, sizes, strict=True))
    held = [size for _, size in by_share]
    assert held == sorted(held)
    if units >= len(shares):
        assert min(sizes) >= 1


@given(units=st.integers(0, 3000), shares=wide_shares)
def test_every_part_is_within_one_unit_of_its_ideal(units, shares):
    total = sum(shares)
    # Who has less than a unit by right takes a whole one from the others: the rule's exception.
    assume(units < len(shares) or all(units * share >= total for share in shares))
    for share, size in zip(shares, part_sizes(units, shares), strict=True):
        assert abs(size * total - units * share) < total


@given(length=st.integers(0, 500), ranks=st.integers(1, 16), unit=st.integers(1, 40))
def test_equal_shares_are_the_equal_cut(length, ranks, unit):
    base, more = divmod(-(-length // unit), ranks)
    edges = [0]
    for rank in range(ranks):
        edges.append(min(length, edges[-1] + unit * (base + (rank < more))))
    expected = [stop - start for start, stop in itertools.pairwise(edges)]
    for parts in (ranks, (1,) * ranks, (7,) * ranks):
        assert part_sizes(length, parts, unit=unit) == expected


@given(
    length=st.integers(0, 2000), shares=shares, unit=st.integers(1, 40), factor=st.integers(2, 9)
)
def test_parts_are_whole_units_and_depend_on_the_ratio_alone(length, shares, unit, factor):
    sizes = part_sizes(length, shares, unit=unit)
    assert sum(sizes) == length
    broken = [index for index, size in enumerate(sizes) if size % unit]
    # The axis's last unit may be broken, wherever its owner stands.
    last = max((index for index, size in enumerate(sizes) if size), default=-1)
    assert broken in ([], [last])
    assert part_sizes(length, tuple(share * factor for share in shares), unit=unit) == sizes


@given(length=st.integers(1, 3000), shares=shares)
def test_features_follow_shares_in_whole_grains(length, shares):
    cut, grain = features(length, shares), grain_for(length, shares)
    assert cut.in_order and sum(cut.sizes) == length
    assert all(start % grain == 0 or start == length for ((start, _),) in cut.ranges)
    if length >= len(shares):
        assert min(cut.sizes) > 0


@given(
    kv_heads=st.integers(1, 12),
    per_kv=st.integers(1, 8),
    head_dim=st.integers(1, 3),
    shares=shares,
)
def test_heads_follow_shares_in_whole_groups(kv_heads, per_kv, head_dim, shares):
    heads = kv_heads * per_kv
    if len(shares) > heads:
        with pytest.raises(ValueError, match=f"use at most tp={heads}$"):
            HeadLayout.of(heads, kv_heads, shares)
        return
    layout = HeadLayout.of(heads, kv_heads, shares)
    for (q_start, q_stop), (start, stop) in zip(layout.query, layout.kv, strict=True):
        assert q_stop > q_start
        assert {head // per_kv for head in range(q_start, q_stop)} == set(range(start, stop))
        assert (q_stop - q_start) % (stop - start) == 0
    dense = torch.arange(heads * head_dim)
    query = layout.query_sharding(head_dim)
    assert query.in_order
    assert torch.equal(query.join([query.split(dense, rank) for rank in range(len(shares))]), dense)
    if kv_heads >= len(shares):
        assert layout.kv_sharding(1).sizes == part_sizes(kv_heads, shares)
    else:
        assert layout.replicated and {start for start, _ in layout.kv} == set(range(kv_heads))


@given(groups=st.integers(1, 8), shares=shares)
def test_runs_of_equal_shares_are_those_of_the_formula(groups, shares):
    ranks = max(groups, len(shares))
    assert runs(groups, ranks, most=ranks) == [rank * groups // ranks for rank in range(ranks)]


@given(data=st.data(), groups=st.integers(1, 6), most=st.integers(1, 6))
def test_every_run_has_a_part_and_none_has_too_many(data, groups, most):
    ranks = data.draw(st.integers(groups, groups * most))
    given_shares = data.draw(st.tuples(*[st.integers(1, 100)] * ranks))
    owner = runs(groups, given_shares, most=most)
    assert owner == sorted(owner) and set(owner) == set(range(groups))
    assert max(map(owner.count, owner)) <= most


def test_examples():
    assert part_sizes(48, (2, 1, 1), unit=4) == [24, 12, 12]
    assert even_parts(9, (5, 3, 1)).sizes == [5, 3, 1]
    # 3 KV groups of 3 heads: the last device's ninth is less than a group, and it gets one.
    assert HeadLayout.of(9, 3, (5, 3, 1)).query == ((0, 3), (3, 6), (6, 9))
    assert HeadLayout.of(16, 8, (5, 3, 1)).query == ((0, 8), (8, 14), (14, 16))
    # One KV head, on all ranks: its query heads follow the shares.
    assert HeadLayout.of(9, 1, (5, 3, 1)).query == ((0, 5), (5, 8), (8, 9))
    # The first KV head is the first rank's alone, the second a replica of the other two.
    layout = HeadLayout.of(8, 2, (5, 3, 1))
    assert layout.kv == ((0, 1), (1, 2), (1, 2)) and layout.query == ((0, 4), (4, 7), (7, 8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((2, 0, 1), "shares of rank 1: expected at least 1, got 0"),
        ((2, -1, 1), "shares of rank 1: expected at least 1, got -1"),
        ((2, 1.5, 1), "shares of rank 1: expected an integer, got 1.5"),
        ((2, True, 1), "shares of rank 1: expected an integer, got True"),
        ((2, "1", 1), "shares of rank 1: expected an integer, got '1'"),
        ((2, 1, MAX_SHARE + 1), "shares of rank 2: expected at most 1000000, got 1000001"),
        ((2, 1), "shares: expected 3, one for each rank of tp=3, got 2"),
        ((1, 1, 1, 1), "shares: expected 3, one for each rank of tp=3, got 4"),
        ("211", "shares: expected a whole number for each rank, got '211'"),
        (3, "shares: expected a whole number for each rank, got 3"),
    ],
)
def test_what_is_no_share_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_shares("shares", given, 3)


def test_shares_are_held_in_lowest_terms():
    assert check_shares("shares", [4, 2, 2], 3) == (2, 1, 1)
    assert check_shares("shares", (6, 6), 2) == (1, 1)
