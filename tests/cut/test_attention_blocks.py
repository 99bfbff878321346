"""The plan of blocks against the mask written out: every pair is seen as often as it should, once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyparallel.comm.context import ContextShards, zigzag_parts
from pyparallel.comm.group import Group
from pyparallel.cut.attention_blocks import plan_blocks
from pyparallel.cut.shard import even_parts


def seen_by_mask(length: int, causal: bool, window: int | None, boundaries: list[int]):
    positions = torch.arange(length)
    behind = positions.unsqueeze(1) - positions
    seen = torch.ones(length, length, dtype=torch.bool)
    if causal:
        seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    document = torch.bucketize(positions, torch.tensor(boundaries[1:-1]), right=True)
    return seen & (document.unsqueeze(1) == document)


def seen_by_blocks(blocks, query_ranges, key_ranges, rows: int):
    """How often each of a rank's queries sees each of a rank's keys, [rows, S_r, T_c]."""
    sizes = [sum(stop - start for start, stop in held) for held in (query_ranges, key_ranges)]
    count = torch.zeros(rows, *sizes, dtype=torch.int64)
    for block in blocks:
        num_queries, num_keys = block.q[1] - block.q[0], block.k[1] - block.k[0]
        assert num_queries > 0 and num_keys > 0, block
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
        mask = block.mask(torch.device("cpu"))
        if mask is not None:
            seen = mask[0, 0]
        elif block.causal:
            assert num_queries == num_keys, block
            seen = seen.tril()
        first, last = block.rows or (0, rows)
        count[first:last, slice(*block.q), slice(*block.k)] += seen
    return count


@settings(max_examples=300)
@given(data=st.data())
def test_every_pair_is_seen_exactly_as_the_mask_says(data) -> None:
    length = data.draw(st.integers(0, 23))
    ranks = data.draw(st.integers(1, 5))
    cut = data.draw(st.sampled_from([zigzag_parts, even_parts]))
    sharding = cut(length, ranks, dim=1)
    causal = data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, 9)) if causal else None
    rows = data.draw(st.integers(1, 3))
    inner = st.lists(st.integers(0, length), max_size=4)
    documents = [[0, *sorted(data.draw(inner)), length] for _ in range(rows)]
    if data.draw(st.booleans()):
        documents = [documents[0]] * rows
    given_documents = tuple(map(tuple, documents))
    if len(set(given_documents)) == 1:
        given_documents = given_documents[:1]
    masks = torch.stack([seen_by_mask(length, causal, window, row) for row in documents])
    positions = [
        torch.cat([torch.arange(start, stop) for start, stop in held]) for held in sharding.ranges
    ]
    for rank in range(ranks):
        for other in range(ranks):
            held = sharding.ranges[rank], sharding.ranges[other]
            blocks = plan_blocks(*held, causal=causal, window=window, documents=given_documents)
            expected = masks[:, positions[rank]][:, :, positions[other]].long()
            assert torch.equal(seen_by_blocks(blocks, *held, rows), expected), blocks


def pairs_of_step(sharding, rank: int, other: int) -> int:
    held = sharding.ranges[rank], sharding.ranges[other]
    return int(seen_by_blocks(plan_blocks(*held, causal=True), *held, 1).sum())


def test_zigzag_gives_every_rank_the_same_causal_work_at_every_step() -> None:
    length, ranks = 64, 4
    for step in range(ranks):
        work = {
            pairs_of_step(zigzag_parts(length, ranks), rank, (rank - step) % ranks)
            for rank in range(ranks)
        }
        assert len(work) == 1, (step, work)
    # With one contiguous part a rank, the last one has almost all of the work of a late step.
    contiguous = even_parts(length, ranks, dim=1)
    assert {pairs_of_step(contiguous, rank, (rank - 1) % ranks) for rank in range(ranks)} == {
        0,
        256,
    }


def test_without_documents_a_step_is_one_call() -> None:
    ranges = zigzag_parts(40, 4).ranges
    for rank in range(4):
        for other in range(4):
            assert len(plan_blocks(ranges[rank], ranges[other], causal=True)) == 1
            assert len(plan_blocks(ranges[rank], ranges[other], causal=False)) == 1


def test_zigzag_sizes_differ_by_at_most_one() -> None:
    for length in range(40):
        for ranks in range(1, 7):
            sizes = zigzag_parts(length, ranks).sizes
            assert sum(sizes) == length and max(sizes) - min(sizes) <= 1


def test_orders_are_inverse_and_positions_follow_the_shards() -> None:
    for length in (0, 1, 7, 24):
        shards = ContextShards(Group.single(), zigzag_parts(length, 3))
        joined = torch.cat(
            [zigzag_parts(length, 3, dim=0).split(torch.arange(length), r) for r in range(3)]
        )
        order = shards.dense_order()
        if order is None:
            assert torch.equal(joined, torch.arange(length)) and shards.rank_order() is None
            continue
        assert torch.equal(joined, shards.rank_order())
        assert torch.equal(joined[order], torch.arange(length))


def test_positions_count_anew_in_every_document() -> None:
    shards = ContextShards.of(6, Group.single(), documents=[[0, 2, 2, 6], [0, 6]])
    assert shards.positions().tolist() == [[0, 1, 2, 3, 4, 5]]
    assert shards.positions(in_documents=True).tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_document_ids_and_boundaries_say_the_same() -> None:
    ids = torch.tensor([[4, 4, 9, 9, 9], [1, 2, 3, 3, 3]])
    by_ids = ContextShards.of(5, Group.single(), documents=ids)
    assert by_ids.documents == ((0, 2, 5), (0, 1, 2, 5))
    assert ContextShards.of(5, Group.single(), documents=[0, 2, 5]).documents == ((0, 2, 5),)
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert ContextShards.of(5, Group.single(), documents=lengths).documents == ((0, 2, 5),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "striped"}, "layout: expected 'zigzag' or 'contiguous', got 'striped'"),
        ({"algorithm": "rings"}, "algorithm: expected one of auto, ring, ulysses, got 'rings'"),
        ({"documents": [0, 3]}, "from 0 to the sequence's 5, got \\[0, 3\\]"),
        ({"documents": [0, 4, 3, 5]}, "ascending boundaries"),
        ({"documents": [[0, 5], [1, 5]]}, "got \\[1, 5\\]"),
        ({"documents": []}, "ascending boundaries"),
        ({"documents": torch.zeros(1, 4)}, "expected ids \\[B, 5\\], got 4"),
    ],
)
def test_bad_shards_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextShards.of(5, Group.single(), **options)


def test_bad_plans_are_refused() -> None:
    ranges = ((0, 4),)
    with pytest.raises(ValueError, match="under causal attention; got 2, causal=False"):
        plan_blocks(ranges, ranges, causal=False, window=2)
    with pytest.raises(ValueError, match="at least 1 key"):
        plan_blocks(ranges, ranges, causal=True, window=0)
    with pytest.raises(ValueError, match="the same or disjoint ones"):
        plan_blocks(ranges, ((2, 6),), causal=True)
