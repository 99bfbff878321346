"""Where a spread cache puts each position: one place each, in equal parts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.layers.context_kv_cache import ContextSlots


class NoCommunicator:
    """Placing needs no peers."""

    name = "none"


def slots_of_ranks(prompt: int, ranks: int, layout: str) -> list[ContextSlots]:
    groups = [Group(rank, ranks, NoCommunicator()) for rank in range(ranks)]
    return [ContextSlots(ContextShards.of(prompt, group, layout=layout)) for group in groups]


@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 5),
    st.sampled_from(["zigzag", "contiguous"]),
)
def test_every_position_has_one_slot_of_one_rank(
    prompt: int, new: int, ranks: int, layout: str
) -> None:
    total = prompt + new
    found = []
    for slots in slots_of_ranks(prompt, ranks, layout):
        count = slots.filled(total)
        assert count <= -(-total // ranks), "more than an equal part"
        held = slots.positions_of(count, torch.device("cpu"))
        assert held.shape == (count,)
        own = slots.slots_of(torch.arange(total))
        assert torch.equal(own[held], torch.arange(count)), "a position's slot holds it"
        assert int((own >= 0).sum()) == count
        found += held.tolist()
    assert sorted(found) == list(range(total))


def test_filling_goes_round_the_ranks() -> None:
    ranks = slots_of_ranks(7, 3, "zigzag")
    sizes = [slots.filled(7) for slots in ranks]
    assert sorted(sizes) == [2, 2, 3]
    for end in range(8, 20):
        now = [slots.filled(end) for slots in ranks]
        assert sum(now) == end and max(now) - min(now) <= 1
        assert sum(b - a for a, b in zip(sizes, now, strict=True)) == 1
        sizes = now
