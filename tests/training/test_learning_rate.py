"""The learning rate of a step: what rises, what falls, and where it ends."""

from __future__ import annotations

import pytest

from pyparallel.training.learning_rate import LR_SCHEDULES, learning_rate


def rates(schedule: str, *, steps: int = 8, warmup: int = 4) -> list[float]:
    return [
        learning_rate(2.0, step, steps=steps, warmup=warmup, schedule=schedule)
        for step in range(steps)
    ]


def test_each_schedule_rises_to_the_peak_and_takes_its_way_down() -> None:
    rising = [0.5, 1.0, 1.5, 2.0]
    assert rates("constant") == [*rising, 2.0, 2.0, 2.0, 2.0]
    assert rates("linear") == [*rising, 2.0, 1.5, 1.0, 0.5]
    half = 1 / 2**0.5
    assert rates("cosine") == pytest.approx([*rising, 2.0, 1 + half, 1.0, 1 - half], rel=2**-50)
    assert rates("constant", warmup=0) == [2.0] * 8


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_a_warm_up_may_be_all_there_is(schedule: str) -> None:
    assert rates(schedule, steps=3, warmup=4) == [0.5, 1.0, 1.5]
    assert rates(schedule, steps=4, warmup=4) == [0.5, 1.0, 1.5, 2.0]


def test_another_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule: expected one of constant, linear, cosine, got"):
        learning_rate(1.0, 0, steps=1, schedule="step")
