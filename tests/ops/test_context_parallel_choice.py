"""The choice between ring and Ulysses: its counts, its reasons, and that it is what runs."""

from __future__ import annotations

import pytest
import torch

from pyparallel import reference
from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.ops.context.attention import context_parallel_attention
from pyparallel.ops.context.choice import SPEEDS, Speed, choose, choose_for, seen_pairs
from pyparallel.testing import normals, run_ranks

LONG = {
    "batch": 1,
    "length": 65536,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "ranks": 4,
    "itemsize": 2,
    "causal": True,
}


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("documents", [None, (0, 3, 3, 12, 17)])
def test_pairs_are_those_of_the_mask(window, documents) -> None:
    ids = torch.bucketize(torch.arange(17), torch.tensor((documents or (0, 17))[1:-1]), right=True)
    same = ids.unsqueeze(1) == ids
    for causal in (True, False):
        if window is not None and not causal:
            continue
        seen = reference.attention_mask(17, 17, causal=causal, window=window) & same
        pairs = seen_pairs(17, causal=causal, window=window, documents=documents)
        assert pairs == int(seen.sum())


def test_long_sequences_with_few_kv_heads_take_the_ring() -> None:
    choice = choose(**LONG)
    assert choice.algorithm == "ring" and "under its work" in choice.reason
    assert choice.ring_s <= choice.ulysses_s


def test_short_sequences_on_many_ranks_take_ulysses() -> None:
    short = {**LONG, "length": 512, "num_kv_heads": 32, "ranks": 8}
    choice = choose(**short, speed=SPEEDS["cuda"])
    assert choice.algorithm == "ulysses" and "longer than its work" in choice.reason


def test_uneven_heads_cost_ulysses_the_busiest_rank() -> None:
    even = choose(**{**LONG, "num_heads": 8, "num_kv_heads": 8})
    uneven = choose(**{**LONG, "num_heads": 9, "num_kv_heads": 9})
    assert "busiest rank 3 of 9 heads" in uneven.reason
    assert uneven.ulysses_s / even.ulysses_s > 1.3
    assert uneven.ring_s / even.ring_s < 1.2


def test_more_ranks_than_heads_leave_the_ring() -> None:
    choice = choose(**{**LONG, "num_heads": 2, "num_kv_heads": 1})
    assert choice.algorithm == "ring" and choice.ulysses_s is None
    assert choice.reason == "2 heads in 1 KV groups can't be cut over 4 ranks"


def test_a_slow_link_is_hidden_only_by_long_blocks() -> None:
    slow = Speed(flops=1e12, bytes_per_s=1e9, latency_s=1e-5)
    sizes = {**LONG, "num_kv_heads": 32}
    chosen = [
        choose(**{**sizes, "length": 1 << power}, speed=slow).algorithm for power in range(8, 20)
    ]
    # Ulysses up to some length, the ring from there on.
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) == 2


def runs_what_it_says(group: Group) -> set[str]:
    taken = set()
    for length, heads in ((64, (4, 4)), (1024, (4, 1)), (8, (2, 1))):
        q, k, v = (normals(1, length, count, 16, seed=1) for count in (heads[0], *heads[1:] * 2))
        shards = ContextShards.of(length, group)
        q, k, v = (shards.split(t) for t in (q, k, v))
        choice = choose_for(q, k, shards, causal=True, window=None)
        with count_collectives() as counter:
            context_parallel_attention(q, k, v, shards, causal=True)
        assert ("ring_shift" in counter) == (choice.algorithm == "ring")
        assert ("all_to_all" in counter) == (choice.algorithm == "ulysses")
        taken.add(choice.algorithm)
    return taken


def test_what_is_chosen_runs() -> None:
    assert run_ranks(runs_what_it_says, 4) == [{"ring", "ulysses"}] * 4


def test_speeds_are_for_the_devices_there_are() -> None:
    assert set(SPEEDS) == {"cpu", "cuda"}
