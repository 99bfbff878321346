"""The pipeline's timeline: nothing runs before what it needs, and the bubble is the formula's."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyparallel.drawing.timeline import KINDS, idle_part, order_of, steps_of
from pyparallel.training.pipeline_schedules import bubble

ONE_CHUNK = ("gpipe", "1f1b")
# Sums of whole numbers are exact; a quotient, its distance from 1 and the formula's own quotient round,
# each of them below 1.
ROUNDINGS = 3 * 2.0**-53


@given(st.sampled_from(ONE_CHUNK), st.integers(2, 8), st.integers(1, 24))
def test_the_bubble_of_equal_stages_is_the_formulas(schedule, ranks, micro_batches):
    steps = steps_of(schedule, [1.0] * ranks, ranks, micro_batches)
    expected = bubble(schedule, ranks=ranks, chunks=1, num_microbatches=micro_batches)
    assert abs(idle_part(steps, ranks) - expected) <= ROUNDINGS


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4))
def test_the_bubble_of_interleaved_stages_is_the_formulas(ranks, chunks, rounds):
    steps = steps_of("interleaved", [1.0] * ranks * chunks, ranks, rounds * ranks)
    given = {"ranks": ranks, "chunks": chunks, "num_microbatches": rounds * ranks}
    assert abs(idle_part(steps, ranks) - bubble("interleaved", **given)) <= ROUNDINGS


@given(st.data())
def test_nothing_runs_before_what_it_needs_or_beside_another(data):
    schedule = data.draw(st.sampled_from(KINDS))
    chunks = data.draw(st.integers(2, 3)) if schedule == "interleaved" else 1
    ranks = data.draw(st.integers(1, 5))
    costs = data.draw(st.tuples(*[st.floats(0.1, 9.0)] * ranks * chunks))
    batches = data.draw(st.integers(1, 3 if chunks > 1 else 12)) * (ranks if chunks > 1 else 1)
    steps = steps_of(schedule, costs, ranks, batches)
    when = {
        (s.passing.chunk * ranks + s.rank, s.passing.backward, s.passing.micro_batch): s
        for s in steps
    }
    assert len(when) == len(steps) == 2 * len(costs) * batches
    for (stage, backward, batch), step in when.items():
        assert step.stop == step.start + costs[stage] * (2 if backward else 1)
        before = stage + 1 if backward else stage - 1
        if 0 <= before < len(costs):
            assert when[before, backward, batch].stop <= step.start
        if backward:
            assert when[stage, False, batch].stop <= step.start
    for rank in range(ranks):
        own = sorted((s for s in steps if s.rank == rank), key=lambda s: s.start)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(own))


def test_1f1b_holds_no_more_micro_batches_than_stages_behind_it():
    for ranks, micro_batches in ((4, 8), (3, 2)):
        for rank in range(ranks):
            held, most = 0, 0
            for passing in order_of("1f1b", ranks, rank, micro_batches):
                held += -1 if passing.backward else 1
                most = max(most, held)
            assert most == min(micro_batches, ranks - rank)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("zero", 2, 0, 2, 1), "schedule: expected one of gpipe, 1f1b, interleaved, got 'zero'"),
        (("1f1b", 2, 0, 2, 2), "chunks: expected 1 a rank for 1f1b, got 2"),
        (("interleaved", 2, 0, 2, 1), "chunks: expected 2 or more a rank for interleaved, got 1"),
        (
            ("interleaved", 4, 0, 6, 2),
            "micro_batches: expected a multiple of pp=4 for interleaved, got 6; use 8",
        ),
    ],
)
def test_what_is_no_schedule_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        order_of(*given)
