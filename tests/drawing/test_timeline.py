"""The pipeline's timeline: nothing runs before what it needs, and the bubble is the formula's."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyparallel.drawing.timeline import KINDS, idle_part, order_of, steps_of
from pyparallel.training.pipeline_schedules import bubble


@given(st.sampled_from(KINDS), st.integers(2, 8), st.integers(1, 24))
def test_the_bubble_of_equal_stages_is_the_formulas(schedule, ranks, micro_batches):
    steps = steps_of(schedule, [1.0] * ranks, micro_batches)
    expected = bubble(schedule, ranks=ranks, chunks=1, num_microbatches=micro_batches)
    assert abs(idle_part(steps, ranks) - expected) < 1e-12


@given(
    st.sampled_from(KINDS),
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=6),
    st.integers(1, 12),
)
def test_nothing_runs_before_what_it_needs_or_beside_another(schedule, costs, micro_batches):
    steps = steps_of(schedule, costs, micro_batches)
    ranks = len(costs)
    when = {(s.rank, s.backward, s.micro_batch): s for s in steps}
    assert len(when) == len(steps) == 2 * ranks * micro_batches
    for step in steps:
        cost = costs[step.rank] * (2 if step.backward else 1)
        assert step.stop == step.start + cost
        before = step.rank + 1 if step.backward else step.rank - 1
        if 0 <= before < ranks:
            assert when[before, step.backward, step.micro_batch].stop <= step.start
        if step.backward:
            assert when[step.rank, False, step.micro_batch].stop <= step.start
    for rank in range(ranks):
        own = sorted((s for s in steps if s.rank == rank), key=lambda s: s.start)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(own))


def test_1f1b_holds_no_more_micro_batches_than_stages_behind_it():
    for ranks, micro_batches in ((4, 8), (3, 2)):
        for rank in range(ranks):
            held, most = 0, 0
            for backward, _ in order_of("1f1b", ranks, rank, micro_batches):
                held += -1 if backward else 1
                most = max(most, held)
            assert most == min(micro_batches, ranks - rank)


def test_another_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule: expected one of gpipe, 1f1b, got 'zero'"):
        order_of("zero", 2, 0, 2)
