"""Ring and Ulysses against dense attention: outputs, gradients, counts, masks, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyparallel import reference
from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.cut.shard import HeadLayout
from pyparallel.ops.context.attention import context_parallel_attention
from pyparallel.testing import assert_equal, assert_within, normals, run_ranks
from tests.bounds import attention_bounds

RANKS = (1, 2, 3, 4)
ALGORITHMS = ("ring", "ulysses")
# Fewer tokens than ranks, fewer than chunks, even, uneven.
LENGTHS = (2, 7, 16, 29)
# (query heads, KV heads): multi-head, grouped and uneven, one KV head.
HEADS = ((4, 4), (6, 2), (5, 1))
BATCH, HEAD_DIM = 2, 8
PARTS = ("o", "dq", "dk", "dv")


def inputs(length: int, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of o, dense; the same on every rank."""
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [
        normals(BATCH, length, count, HEAD_DIM, seed=seed, dtype=dtype)
        for seed, count in enumerate(counts)
    ]


def document_mask(documents: list[list[int]], length: int) -> torch.Tensor:
    rows = []
    for boundaries in documents:
        ids = torch.bucketize(torch.arange(length), torch.tensor(boundaries[1:-1]), right=True)
        rows.append(ids.unsqueeze(1) == ids)
    return torch.stack(rows).unsqueeze(1)


def dense(tensors: list[torch.Tensor], dtype: torch.dtype, options: dict) -> list[torch.Tensor]:
    *qkv, do = (t.to(dtype) for t in tensors)
    qkv = [t.requires_grad_() for t in qkv]
    o, _ = reference.attention(*qkv, **options)
    return [o.detach(), *torch.autograd.grad(o, qkv, do)]


def on_shards(
    tensors: list[torch.Tensor], shards: ContextShards, causal: bool, window: int | None
) -> list[torch.Tensor]:
    *qkv, do = (shards.split(t) for t in tensors)
    qkv = [t.requires_grad_() for t in qkv]
    o = context_parallel_attention(*qkv, shards, causal=causal, window=window)
    return [o.detach(), *torch.autograd.grad(o, qkv, do)]


def compare(
    group: Group,
    tensors: list[torch.Tensor],
    shards: ContextShards,
    what: str,
    *,
    causal: bool,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    options = {"causal": causal, "window": window, "mask": mask}
    truth = dense(tensors, torch.float64, options)
    bounds = attention_bounds(*tensors, parts=group.size, **options)
    # The log-sum-exp stays inside.
    del bounds[1]
    for part, ours, exact, bound in zip(
        PARTS, on_shards(tensors, shards, causal, window), truth, bounds, strict=True
    ):
        assert ours.dtype == tensors[0].dtype, what
        assert_within(ours, *(shards.split(t) for t in (exact, bound)), f"{what} {part}")


def sweep(group: Group, algorithm: str, dtype: torch.dtype) -> int:
    compared = 0
    for length, heads, layout, causal in itertools.product(
        LENGTHS, HEADS, ("zigzag", "contiguous"), (True, False)
    ):
        shards = ContextShards.of(length, group, layout=layout, algorithm=algorithm)
        tensors = inputs(length, heads, dtype)
        what = f"{algorithm} S={length} heads={heads} {layout} causal={causal} {dtype}"
        compare(group, tensors, shards, what, causal=causal)
        compared += 1
    return compared


@pytest.mark.parametrize("ranks", RANKS)
def test_outputs_and_gradients_are_the_dense_ones(ranks: int) -> None:
    for algorithm, dtype in itertools.product(ALGORITHMS, (torch.float32, torch.bfloat16)):
        assert run_ranks(sweep, ranks, algorithm, dtype) == [48] * ranks


def masks(group: Group) -> None:
    documents = [[0, 3, 3, 4, 17, 21], [0, 21]]
    for algorithm, layout, causal, rows in itertools.product(
        ALGORITHMS, ("zigzag", "contiguous"), (True, False), (documents, documents[:1])
    ):
        length = 21
        options = {"layout": layout, "algorithm": algorithm}
        shards = ContextShards.of(length, group, documents=rows, **options)
        mask = document_mask(rows, length).expand(BATCH, -1, -1, -1)
        what = f"{algorithm} {layout} causal={causal} documents={rows}"
        tensors = inputs(length, (6, 2), torch.float32)
        compare(group, tensors, shards, what, causal=causal, mask=mask)
        if not causal:
            continue
        for window in (1, 4, 30):
            compare(
                group, tensors, shards, f"{what} {window}", causal=True, window=window, mask=mask
            )
            plain = ContextShards.of(length, group, **options)
            compare(group, tensors, plain, f"{what} {window} plain", causal=True, window=window)


@pytest.mark.parametrize("ranks", RANKS)
def test_document_masks_and_windows_reach_across_shards(ranks: int) -> None:
    run_ranks(masks, ranks)


def same_bits(group: Group) -> None:
    length = 23
    for heads in HEADS:
        tensors = inputs(length, heads, torch.bfloat16)
        for algorithm in ALGORITHMS:
            shards = ContextShards.of(length, group, algorithm=algorithm)
            first, again = (on_shards(tensors, shards, True, None) for _ in range(2))
            for part, one, two in zip(PARTS, first, again, strict=True):
                assert_equal(one, two, f"{algorithm} {part} again")
        # A head's attention is one computation wherever it runs: Ulysses only moves it.
        whole = ContextShards.of(length, Group.single(), layout="contiguous")
        expected = on_shards(tensors, whole, True, None)
        layout = HeadLayout.of(*heads, group.size)
        for part, one, two in zip(PARTS, first, expected, strict=True):
            # A KV head's gradient on several ranks is summed in another order.
            if part in ("o", "dq") or not layout.replicated:
                assert_equal(one, shards.split(two), f"ulysses {heads} {part}")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_runs_repeat_to_the_bit_and_ulysses_only_moves(ranks: int) -> None:
    run_ranks(same_bits, ranks)


def counts(group: Group) -> None:
    ranks, length, itemsize = group.size, 26, 2
    heads, kv_heads = 6, 2
    tensors = inputs(length, (heads, kv_heads), torch.bfloat16)
    shards = ContextShards.of(length, group, algorithm="ring")
    sizes = shards.sizes
    own = sizes[group.rank]
    *qkv, do = (shards.split(t) for t in tensors)
    qkv = [t.requires_grad_() for t in qkv]

    with count_collectives() as forward:
        o = context_parallel_attention(*qkv, shards, causal=True)
    with count_collectives() as backward:
        torch.autograd.grad(o, qkv, do)
    token = 2 * BATCH * kv_heads * HEAD_DIM
    # Every block but the one that is home by the next step: the last the rank has held.
    passed = sum(sizes) - sizes[(group.rank + 1) % ranks]
    assert forward == {"ring_shift": ranks - 1, ("ring_shift", "bytes"): passed * token * itemsize}
    assert backward == {
        "ring_shift": 2 * ranks - 1,
        ("ring_shift", "bytes"): passed * token * itemsize + sum(sizes) * token * 4,
    }

    shards = ContextShards.of(length, group, algorithm="ulysses")
    with count_collectives() as forward:
        o = context_parallel_attention(*qkv, shards, causal=True)
    with count_collectives() as backward:
        torch.autograd.grad(o, qkv, do)
    layout = HeadLayout.of(heads, kv_heads, ranks)
    held = [stop - start for start, stop in layout.query]
    copies = sum(stop - start for start, stop in layout.kv)
    assert copies == max(kv_heads, ranks)
    feature = BATCH * HEAD_DIM * itemsize
    enter = own * (heads + 2 * copies) * feature
    leave = length * held[group.rank] * feature
    assert forward == {"all_to_all": 2, ("all_to_all", "bytes"): enter + leave}
    gradients = own * heads + length * (
        held[group.rank] + 2 * (layout.kv[group.rank][1] - layout.kv[group.rank][0])
    )
    assert backward == {"all_to_all": 2, ("all_to_all", "bytes"): gradients * feature}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_communication_is_what_the_formulas_say(ranks: int) -> None:
    run_ranks(counts, ranks)


def over_torch(group: Group) -> None:
    process_group = torch.distributed.group.WORLD
    gloo = Group.over(TorchCommunicator(process_group, "gloo"))
    for algorithm in ALGORITHMS:
        tensors = inputs(13, (6, 2), torch.float32)
        results = [
            on_shards(tensors, ContextShards.of(13, over, algorithm=algorithm), True, None)
            for over in (group, gloo)
        ]
        for part, one, two in zip(PARTS, *results, strict=True):
            assert_equal(one, two, f"{algorithm} {part}")


def test_every_engine_gives_the_same_bits() -> None:
    run_ranks(over_torch, 3)


def refusals(group: Group) -> None:
    q, k, v, _ = inputs(8, (6, 2), torch.float32)
    shards = ContextShards.of(8, group)
    cases = [
        ((q, k, v), shards, f"q: expected \\[B, {8 // group.size}, heads, D\\]"),
        ((q[:, :4], k[:, :4, :, :4], v[:, :4, :, :4]), shards, "of its size 8"),
        ((q[:, :4], k[:, :4], v[:, :4, :1]), shards, "the same shape"),
        ((q[:, :4, :5], k[:, :4], v[:, :4]), shards, "divide q's 5"),
        (
            (q[:, :4], k[:, :4], v[:, :4]),
            ContextShards.of(8, group, documents=[[0, 8], [0, 4, 8], [0, 8]]),
            "each of 2 sequences, got 3",
        ),
        (
            (q[:, :4, :1], k[:, :4, :1], v[:, :4, :1]),
            ContextShards.of(8, group, algorithm="ulysses"),
            "1 query heads in 1 KV groups can't be cut over cp=2 ranks; use algorithm='ring'",
        ),
    ]
    for tensors, cut, message in cases:
        with pytest.raises(ValueError, match=message):
            context_parallel_attention(*tensors, cut, causal=True)
    with pytest.raises(ValueError, match="under causal attention"):
        context_parallel_attention(q[:, :4], k[:, :4], v[:, :4], shards, window=2)


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_ranks(refusals, 2)
