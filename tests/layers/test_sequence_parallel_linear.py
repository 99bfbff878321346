"""Column and row layers and QKV with the sequence cut over the ranks, against dense ones.

Inputs are small integers, so every comparison is exact.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes, split_sequence
from pyparallel.layers import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from pyparallel.testing import assert_equal, integers, own, run_ranks
from tests.layers.counts import counted, expected_counts

RANKS = [1, 2, 3, 4]
DTYPES = (torch.float32, torch.bfloat16)
# (leading axes, S, K, M): lengths that divide and that don't, no batch axis, an empty batch, features
# fewer than ranks.
SHAPES = (
    ((2,), 8, 7, 12),
    ((3,), 5, 33, 65),
    ((), 7, 4, 3),
    ((1,), 4, 1, 2),
    ((2, 2), 6, 3, 5),
    ((0,), 4, 3, 5),
)


def dense_linear(k: int, m: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(k, m, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(integers(m, k, seed=1, dtype=dtype))
        if bias:
            linear.bias.copy_(integers(m, seed=2, dtype=dtype))
    return linear


def column(group: Group, shapes) -> None:
    for dtype in DTYPES:
        for lead, s, k, m in shapes:
            for bias in (True, False):
                what = f"{dtype} {lead} S={s} K={k} M={m} bias={bias}"
                linear = dense_linear(k, m, bias, dtype)
                module = ColumnParallelLinear.from_dense(
                    linear, group=group, sequence_parallel=True
                )
                cut = module.shardings["weight"].along(-1)
                x = integers(*lead, s, k, seed=3, dtype=dtype).requires_grad_()
                dy = integers(*lead, s, m, seed=4, dtype=dtype)
                y = linear(x)
                grads = torch.autograd.grad(y, [x, *linear.parameters()], dy)

                sizes = sequence_sizes(s, group)
                x_shard = x.detach().split(sizes, -2)[group.rank].clone().requires_grad_()
                with count_collectives() as forward:
                    y_shard = module(x_shard, length=s)
                with count_collectives() as backward:
                    own_grads = torch.autograd.grad(
                        y_shard, [x_shard, *module.parameters()], cut.split(dy, group.rank)
                    )
                assert_equal(y_shard, cut.split(y, group.rank), what + " y")
                assert_equal(own_grads[0], grads[0].split(sizes, -2)[group.rank], what + " dx")
                names = ("weight", "bias")
                for name, grad, dense in zip(names, own_grads[1:], grads[1:], strict=False):
                    assert_equal(grad, own(module, name, dense, group), f"{what} d{name}")
                size = x.numel() * x.itemsize
                assert counted(forward) == expected_counts(group, all_gather=(1, size)), what
                assert counted(backward) == expected_counts(
                    group, all_gather=(1, size), reduce_scatter=(1, size)
                ), what


def row(group: Group, shapes) -> None:
    for dtype in DTYPES:
        for lead, s, k, m in shapes:
            for bias in (True, False):
                what = f"{dtype} {lead} S={s} K={k} M={m} bias={bias}"
                linear = dense_linear(k, m, bias, dtype)
                module = RowParallelLinear.from_dense(linear, group=group, sequence_parallel=True)
                cut = module.shardings["weight"].along(-1)
                x = integers(*lead, s, k, seed=3, dtype=dtype).requires_grad_()
                dy = integers(*lead, s, m, seed=4, dtype=dtype)
                y = linear(x)
                grads = torch.autograd.grad(y, [x, *linear.parameters()], dy)

                sizes = sequence_sizes(s, group)
                x_shard = cut.split(x.detach(), group.rank).requires_grad_()
                with count_collectives() as forward:
                    y_shard = module(x_shard)
                with count_collectives() as backward:
                    own_grads = torch.autograd.grad(
                        y_shard,
                        [x_shard, *module.parameters()],
                        dy.split(sizes, -2)[group.rank],
                    )
                assert_equal(y_shard, y.split(sizes, -2)[group.rank], what + " y")
                assert_equal(own_grads[0], cut.split(grads[0], group.rank), what + " dx")
                names = ("weight", "bias")
                for name, grad, dense in zip(names, own_grads[1:], grads[1:], strict=False):
                    assert_equal(grad, own(module, name, dense, group), f"{what} d{name}")
                size = dy.numel() * dy.itemsize
                assert counted(forward) == expected_counts(group, reduce_scatter=(1, size)), what
                assert counted(backward) == expected_counts(group, all_gather=(1, size)), what


def column_and_row(group: Group, shapes) -> None:
    column(group, shapes)
    row(group, shapes)


@pytest.mark.parametrize("ranks", RANKS)
def test_equals_dense_exactly_on_integers(ranks):
    run_ranks(column_and_row, ranks, SHAPES)


shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=1).map(tuple),
    st.integers(4, 40),
    st.integers(1, 70),
    st.integers(1, 140),
)


@settings(max_examples=4)
@given(ranks=st.integers(2, 4), shapes=st.lists(shapes, min_size=4, max_size=4))
def test_any_shape(ranks, shapes):
    run_ranks(column_and_row, ranks, shapes)


def saved_bytes(group: Group) -> tuple[int, int]:
    """Bytes that a column and a row layer keep for backward, parameters aside."""
    s, k, m = 24, 8, 16
    kept = []
    for module, x in (
        (ColumnParallelLinear(k, m, group=group, sequence_parallel=True), (s // group.size, k)),
        (RowParallelLinear(k, m, group=group, sequence_parallel=True), (s, k // group.size)),
    ):
        own_storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
        total = 0

        def count(tensor: torch.Tensor, own_storages=own_storages) -> torch.Tensor:
            nonlocal total
            if tensor.untyped_storage().data_ptr() not in own_storages:
                total += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(torch.ones(2, *x, requires_grad=True))
        kept.append(total)
    return tuple(kept)


def test_only_the_shard_is_kept_for_backward():
    for ranks in (2, 4):
        assert run_ranks(saved_bytes, ranks) == [(2 * 24 * 8 * 4 // ranks,) * 2] * ranks


def qkv(group: Group) -> None:
    """Three projections in one gather; fewer KV heads than ranks, whose gradients are summed."""
    head_dim, s = 4, 7
    parts = [dense_linear(12, heads * head_dim, True, torch.float32) for heads in (6, 2, 2)]
    module = QKVParallelLinear.from_dense(
        *parts, head_dim=head_dim, group=group, sequence_parallel=True
    )
    x = integers(2, s, 12, seed=3).requires_grad_()
    dy = [integers(2, s, heads, head_dim, seed=4 + i) for i, heads in enumerate((6, 2, 2))]
    dense = [part(x).unflatten(-1, (-1, head_dim)) for part in parts]
    (dx,) = torch.autograd.grad(dense, x, dy)
    layout = module.layout
    ranges = [layout.query[group.rank], layout.kv[group.rank], layout.kv[group.rank]]
    with count_collectives() as counter:
        heads = module(split_sequence(x, group), length=s)
    assert {n: c for n, c in counter.items() if isinstance(n, str)} == (
        {"all_gather": 1} if group.size > 1 else {}
    )
    for actual, whole, (a, b) in zip(heads, dense, ranges, strict=True):
        assert_equal(actual, whole[:, :, a:b], "heads")
    # Each replica's rank brings the gradient of its own query heads alone.
    first = next(r for r in range(group.size) if layout.kv[r] == ranges[1]) == group.rank
    sent = [dy[0][:, :, ranges[0][0] : ranges[0][1]]]
    sent += [g[:, :, a:b] * first for g, (a, b) in zip(dy[1:], ranges[1:], strict=True)]
    own_dx, weight = torch.autograd.grad(heads, [x, module.weight], sent)
    assert_equal(own_dx, dx, "dx")
    dense_weights = [part.weight for part in parts]
    dense_grads = torch.autograd.grad(
        [part(x.detach()).unflatten(-1, (-1, head_dim)) for part in parts], dense_weights, dy
    )
    assert_equal(weight, own(module, "weight", torch.cat(dense_grads), group), "dw")


@pytest.mark.parametrize("ranks", RANKS)
def test_qkv(ranks):
    run_ranks(qkv, ranks)


def refused(group: Group) -> list[str]:
    column = ColumnParallelLinear(4, 4, group=group, sequence_parallel=True)
    row = RowParallelLinear(4, 4, group=group, sequence_parallel=True)
    embedding = VocabParallelEmbedding(4, 4, group=group, sequence_parallel=True)
    messages = []
    for call in (
        lambda: column(torch.zeros(1, 1, 4), length=2),
        lambda: column(torch.zeros(1, 5, 4), length=9),
        lambda: column(torch.zeros(4)),
        lambda: row(torch.zeros(1, 2, 2)),
        lambda: embedding(torch.zeros(1, 2, dtype=torch.long)),
        lambda: split_sequence(torch.zeros(1, 2, 4), group),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_sequences_too_short_and_wrong_shards_are_refused():
    short = (
        "sequence: expected at least 3 tokens, one for each rank, got 2; run sequences this short "
        "without sequence_parallel"
    )
    for rank, messages in enumerate(run_ranks(refused, 3)):
        assert messages == [
            short,
            f"x: expected 3 of length=9 tokens on rank {rank} of 3, got 5; cut it with "
            "split_sequence",
            "x: expected [..., S, H], got shape (4,)",
            short,
            short,
            short,
        ]
