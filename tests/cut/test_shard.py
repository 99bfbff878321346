"""Cutting and joining are inverse, for every number of ranks from 1 to 16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyparallel.cut.shard import (
    GRAIN,
    REPLICATED,
    HeadLayout,
    Sharding,
    even_parts,
    features,
    fuse,
    grain_for,
    part_sizes,
)
from pyparallel.testing import poisoned_empty

RANKS = range(1, 17)


def numbered(length: int, dim: int) -> torch.Tensor:
    """Every element is its own: a shard that holds a wrong one can't be right by chance."""
    shape = [2, 3]
    shape[dim] = length
    return torch.arange(length * (5 - [2, 3][dim])).view(shape).float()


def check_inverse(sharding: Sharding, ranks: int) -> None:
    dense = numbered(sharding.length, sharding.dim)
    shards = [sharding.split(dense, rank) for rank in range(ranks)]
    for rank, shard in enumerate(shards):
        assert shard.shape == sharding.local_shape(dense.shape, rank)
        assert shard.shape[sharding.dim] == sharding.sizes[rank]
        if shard.numel():
            assert shard.untyped_storage().data_ptr() != dense.untyped_storage().data_ptr()
    with poisoned_empty():
        assert torch.equal(sharding.join(shards), dense)


@given(length=st.integers(0, 300), unit=st.integers(1, 40))
def test_parts_are_nearly_equal_multiples_of_the_unit(length, unit):
    for ranks in RANKS:
        sizes = part_sizes(length, ranks, unit=unit)
        assert len(sizes) == ranks and sum(sizes) == length
        units = [-(-size // unit) for size in sizes]
        assert units == sorted(units, reverse=True) and units[0] - units[-1] <= 1
        # Only the last part that is not empty may hold a broken unit.
        broken = [index for index, size in enumerate(sizes) if size % unit]
        assert broken in ([], [sum(size > 0 for size in sizes) - 1])


@given(length=st.integers(0, 200), unit=st.integers(1, 9), dim=st.integers(0, 1))
def test_even_parts_join_to_what_was_split(length, unit, dim):
    for ranks in RANKS:
        sharding = even_parts(length, ranks, unit=unit, dim=dim)
        assert sharding.in_order
        check_inverse(sharding, ranks)


@given(lengths=st.lists(st.integers(0, 90), min_size=2, max_size=4), dim=st.integers(0, 1))
def test_fused_parts_join_to_what_was_split(lengths, dim):
    for ranks in RANKS:
        cuts = [even_parts(length, ranks, dim=dim) for length in lengths]
        fused = fuse(*cuts)
        check_inverse(fused, ranks)
        # A rank's part of the fused tensor is its parts of the tensors, one after another.
        tensors = [numbered(length, dim) + 1000 * i for i, length in enumerate(lengths)]
        for rank in range(ranks):
            apart = [cut.split(t, rank) for cut, t in zip(cuts, tensors, strict=True)]
            together = fused.split(torch.cat(tensors, dim), rank)
            assert torch.equal(together, torch.cat(apart, dim))


@given(kv_heads=st.integers(1, 20), per_kv=st.integers(1, 8), head_dim=st.integers(1, 3))
def test_heads_join_to_what_was_split(kv_heads, per_kv, head_dim):
    heads = kv_heads * per_kv
    for ranks in RANKS:
        # A KV head with per_kv query heads has at most per_kv replicas.
        replicas = [r * kv_heads // ranks for r in range(ranks)]
        fits = ranks <= kv_heads or max(map(replicas.count, replicas)) <= per_kv
        if not fits:
            with pytest.raises(ValueError, match=f"tp={ranks} is more than {heads} heads"):
                HeadLayout.of(heads, kv_heads, ranks)
            continue
        layout = HeadLayout.of(heads, kv_heads, ranks)
        query = layout.query_sharding(head_dim)
        assert query.in_order
        check_inverse(query, ranks)
        check_inverse(layout.kv_sharding(head_dim, dim=1), ranks)
        check_inverse(layout.qkv_sharding(head_dim), ranks)
        assert layout.replicated == (ranks > kv_heads)
        for (q_start, q_stop), (start, stop) in zip(layout.query, layout.kv, strict=True):
            assert q_stop > q_start
            # A rank holds exactly the KV heads that its query heads read.
            assert {head // per_kv for head in range(q_start, q_stop)} == set(range(start, stop))
            # The kernels find a query head's KV head by its place among the local ones.
            assert (q_stop - q_start) % (stop - start) == 0
        if ranks <= kv_heads:
            assert layout.kv_sharding(head_dim).sizes == [
                size * head_dim for size in part_sizes(kv_heads, ranks)
            ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "most"), [(9, 3, 9), (4, 4, 4), (4, 1, 4), (8, 2, 8), (6, 2, 6)]
)
def test_the_error_says_how_many_ranks_the_heads_allow(heads, kv_heads, most):
    HeadLayout.of(heads, kv_heads, most)
    with pytest.raises(ValueError, match=f"use at most tp={most}$"):
        HeadLayout.of(heads, kv_heads, most + 1)
    with pytest.raises(ValueError, match=f"use at most tp={most}$"):
        HeadLayout.of(heads, kv_heads, 60)


@given(heads=st.integers(1, 40), kv_heads=st.integers(0, 41))
def test_kv_heads_divide_the_heads(heads, kv_heads):
    if kv_heads and heads % kv_heads == 0:
        assert HeadLayout.of(heads, kv_heads, 1).query == ((0, heads),)
    else:
        with pytest.raises(ValueError, match=f"divisor of num_heads={heads}, got {kv_heads}"):
            HeadLayout.of(heads, kv_heads, 1)


@given(length=st.integers(1, 2000))
def test_features_are_cut_in_grains_where_they_can_be(length):
    for ranks in RANKS:
        grain = grain_for(length, ranks)
        assert grain == 1 or length >= grain * ranks
        assert grain == GRAIN or length < 2 * grain * ranks
        sharding = features(length, ranks)
        check_inverse(sharding, ranks)
        if length >= ranks:
            assert min(sharding.sizes) > 0
        for ((start, _),) in sharding.ranges:
            assert start % grain == 0 or start == length


def test_a_replicated_tensor_is_copied():
    dense = torch.arange(6).view(2, 3)
    part = REPLICATED.split(dense, 1)
    assert torch.equal(part, dense) and part.data_ptr() != dense.data_ptr()
    assert torch.equal(REPLICATED.join([part, part]), dense)
    assert REPLICATED.local_shape((2, 3), 1) == (2, 3)


def test_errors_name_what_does_not_fit():
    cut = even_parts(10, 3)
    with pytest.raises(ValueError, match=r"axis 0 .* shape \(9, 2\) should have length 10"):
        cut.split(torch.zeros(9, 2), 0)
    with pytest.raises(ValueError, match="join: expected 3 shards, got 2"):
        cut.join([torch.zeros(4), torch.zeros(3)])
    with pytest.raises(ValueError, match="parts >= 1"):
        part_sizes(4, 0)
