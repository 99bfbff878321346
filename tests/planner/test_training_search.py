"""Training: what fits, what is picked, and how little is tried."""

from __future__ import annotations

import pytest

from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.plans import training_search as module
from pyparallel.planner.plans.candidates import meshes, schedules
from pyparallel.planner.plans.search import TIE
from pyparallel.planner.plans.training import named
from pyparallel.planner.plans.training_search import TrainingCandidate, most_saving, training_search
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Strategy, Training
from pyparallel.planner.training_time import training_time


def searched(model: str, gpus: int, batch: int, sequence: int = 8192) -> list[TrainingCandidate]:
    return training_search(model_shape(model), cluster_of("h100", gpus), Training(batch, sequence))


def test_the_best_is_the_fastest_that_fits() -> None:
    found = searched("llama-3.1-70b", 64, 64)
    fitting = [each for each in found if each.fits]
    fastest = max(each.tokens_per_s for each in fitting)
    assert found[0].tokens_per_s >= (1 - TIE) * fastest
    for each in found:
        assert each.fits == (each.peak.total <= each.limit_bytes)
        assert each.strategy.ranks == 64


def test_a_small_model_is_not_recomputed_and_a_large_one_is() -> None:
    assert searched("llama-3.1-8b", 8, 64)[0].strategy.recompute == "none"
    assert searched("llama-3.1-405b", 1024, 512)[0].strategy.recompute == "layers"


def test_cp_where_a_batch_is_too_small_for_the_gpus() -> None:
    # 32 sequences of 128k tokens on 1024 GPUs: 32 replicas at most, which wait in a pipeline of 4.
    best = searched("llama-3.1-405b", 1024, 32, 131_072)[0]
    assert best.strategy.cp > 1
    # Sequences of 8k give no rank enough tokens.
    assert searched("llama-3.1-405b", 1024, 512)[0].strategy.cp == 1


def test_no_schedule_that_was_left_out_is_faster() -> None:
    # Of one mesh, all savings: the first that fits is the fastest that fits.
    shape, cluster, work = model_shape("llama-3.1-8b"), cluster_of("h100", 8), Training(64, 8192)
    best = next(each for each in training_search(shape, cluster, work) if each.strategy.tp == 8)
    for zero, recompute in module.SAVINGS:
        other = Strategy(
            dp=1, tp=8, sp=True, zero=0 if zero == 1 else zero, recompute=recompute, micro_batch=1
        )
        step = training_time(shape, other, work, cluster)
        assert step.total >= best.step.total * (1 - 1e-9)


def test_a_thousand_gpus_are_few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"memory": 0, "time": 0}
    memory, time = module.training_memory, module.training_time

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(module, "training_memory", count("memory", memory))
    monkeypatch.setattr(module, "training_time", count("time", time))
    searched("llama-3.1-405b", 1024, 512)
    # 0.2 to 0.4 ms each: a fifth of a second of a CPU.
    assert counts["memory"] < 520
    assert counts["time"] < 160
    # Of a schedule the first saving that fits is timed, no other.
    counts["time"] = 0
    searched("llama-3.1-8b", 8, 64)
    shape, cluster, work = model_shape("llama-3.1-8b"), cluster_of("h100", 8), Training(64, 8192)
    ways = [
        schedule
        for mesh in meshes(shape, cluster, 8192, nodes_of_tp=1)
        for schedule in schedules(shape, work, mesh)
    ]
    assert 0 < counts["time"] <= len(ways)


def test_a_batch_that_no_mesh_divides() -> None:
    assert all(each.strategy.dp in (1, 3) for each in searched("llama-3.1-8b", 12, 3))


def test_most_saving_fits_where_the_search_does() -> None:
    for model, gpus in (("llama-3.1-8b", 1), ("llama-3.1-70b", 8), ("llama-3.1-70b", 16)):
        shape, cluster, work = model_shape(model), cluster_of("h100", gpus), Training(16, 8192)
        fits = training_search(shape, cluster, work)[0].fits
        assert (most_saving(shape, cluster, work) is not None) == fits


def test_a_plan_is_named() -> None:
    strategy = Strategy(
        dp=4, pp=2, tp=8, sp=True, zero=1, virtual_stages=4, recompute="layers", micro_batch=2
    )
    assert named(strategy) == (
        "tp 8 x pp 2 x dp 4 + sp, ZeRO 1, micro-batch 2, 4 stages a rank, layers recomputed"
    )
