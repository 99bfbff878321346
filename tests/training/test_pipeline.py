"""Pipelined training against the dense model: loss, all gradients, messages, delays, errors."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.testing import poisoned_empty
from pyparallel.training.data import data_parallel
from pyparallel.training.pipeline import Pipeline
from tests.training.pipeline_checks import batch_of, check_gradients, check_loss, dense_truth, reset

FAMILIES = ("llama", "llama tied", "gpt2")
# name: stages a rank, order.
SCHEDULES = {
    "gpipe": (1, "loop"),
    "1f1b": (1, "loop"),
    "interleaved": (2, "loop"),
    "zero_bubble": (2, "loop"),
    "zero_bubble_v": (2, "v"),
}
Cases = dict[str, tuple[str, dict]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("model")
        made[family] = (str(folder), dense_truth(family, folder))
    return made


def train(mesh: Mesh, folder: str, truth: dict, schedule: str, m: int, **options: Any) -> None:
    """Two steps and an evaluation of one schedule; both steps' gradients are the dense ones."""
    chunks, order = SCHEDULES[schedule]
    chunks = options.pop("chunks", chunks)
    ids, targets = batch_of()
    with poisoned_empty():
        stages = load_stages(folder, mesh, chunks=chunks, order=order, **options)
        pipeline = Pipeline(stages, mesh, schedule=schedule, num_microbatches=m)
        what = f"{schedule} m={m} {mesh} {options}"
        parts = m * mesh.tp.size * mesh.cp.size
        for _ in range(2):
            reset(stages)
            check_loss(pipeline.step(ids, targets), truth, parts, what)
            check_gradients(stages, mesh, truth, parts, what, summed=mesh.cp.size == 1)
        check_loss(pipeline.evaluate(ids, targets), truth, parts, what)


def two_stages(cases: Cases, schedule: str) -> None:
    mesh = init_mesh(pp=2)
    for folder, truth in cases.values():
        # 6 sequences in 4 parts: two of padding.
        for m in (2, 3, 4):
            train(mesh, folder, truth, schedule, m)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_dense_gradients(cases: Cases, schedule: str) -> None:
    launch(two_stages, 2, cases, schedule, threads=1)


def three_stages(cases: Cases) -> None:
    mesh = init_mesh(pp=3)
    for folder, truth in cases.values():
        train(mesh, folder, truth, "1f1b", 4)
        train(mesh, folder, truth, "gpipe", 1)
        train(mesh, folder, truth, "zero_bubble", 3, chunks=1)


def test_five_layers_over_three_stages(cases: Cases) -> None:
    launch(three_stages, 3, cases, threads=1)


def composed(cases: Cases) -> None:
    mesh = init_mesh(pp=2, tp=2)
    for folder, truth in cases.values():
        for schedule in SCHEDULES:
            # 7 tokens over 2 ranks, so that stages hand on uneven shards.
            train(mesh, folder, truth, schedule, 3, sequence_parallel=True)
        train(mesh, folder, truth, "1f1b", 2)
        train(mesh, folder, truth, "zero_bubble_v", 2, recompute="layers")
    folder, truth = cases["llama tied"]
    across = init_mesh(pp=2, cp=2)
    for schedule in ("1f1b", "interleaved", "zero_bubble"):
        train(across, folder, truth, schedule, 2)


def test_with_tensor_sequence_and_context_parallel(cases: Cases) -> None:
    launch(composed, 4, cases, threads=1)


def with_replicas(cases: Cases) -> None:
    """Replicas see 4 and 2 of the 6 sequences, with other numbers of targets."""
    ids, targets = batch_of()
    for sizes in ({"dp": 2, "pp": 2}, {"pp": 2, "cp": 2}):
        mesh = init_mesh(**sizes)
        rows = (slice(0, 4), slice(4, 6))[mesh.dp.rank] if mesh.dp.size > 1 else slice(None)
        for engine in ("ddp", "fsdp"):
            for schedule, (chunks, order) in SCHEDULES.items():
                folder, truth = cases["llama tied" if engine == "ddp" else "gpt2"]
                if sizes.get("cp") and schedule in ("gpipe", "interleaved"):
                    continue
                stages = load_stages(folder, mesh, chunks=chunks, order=order)
                wrapped = [data_parallel(stage, mesh, engine=engine) for stage in stages]
                options = {"schedule": schedule, "num_microbatches": 2}
                if schedule.startswith("zero") and engine == "fsdp":
                    with pytest.raises(ValueError, match=r"expected no FSDP for .* engine='ddp'"):
                        Pipeline(wrapped, mesh, **options)
                    continue
                pipeline = Pipeline(wrapped, mesh, **options)
                what = f"{engine} {schedule} {sizes}"
                for _ in range(2):
                    reset(wrapped)
                    check_loss(pipeline.step(ids[rows], targets[rows]), truth, 4, what)
                    check_gradients(stages, mesh, truth, 4, what)
                check_loss(pipeline.evaluate(ids[rows], targets[rows]), truth, 4, what)


# Wider than what test_mesh_training.py has of it: every schedule with both engines.
@pytest.mark.slow
def test_with_data_parallel(cases: Cases) -> None:
    launch(with_replicas, 4, cases, threads=1)


def accumulated(folder: str) -> None:
    """Two steps without a reset add up, the shared weight's gradient too; an own loss is the mean."""
    mesh = init_mesh(pp=2)
    stage = load(folder, mesh)

    def own(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert logits.shape[-1] == 61
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    ids, targets = batch_of()
    first = Pipeline(stage, mesh, num_microbatches=2)
    second = Pipeline(stage, mesh, num_microbatches=2, loss=own)
    losses = [first.step(ids, targets)]
    once = {name: p.grad.clone() for name, p in stage.named_parameters()}
    losses.append(second.step(ids, targets))
    torch.testing.assert_close(*losses)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(
            parameter.grad, 2 * once[name], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradients_accumulate(cases: Cases) -> None:
    launch(accumulated, 2, cases["gpt2"][0], threads=1)


def delayed(folder: str, truth: dict) -> None:
    """Every forward and backward of every layer takes a random time."""
    mesh = init_mesh(pp=2)
    chance = random.Random(mesh.pp.rank)
    ids, targets = batch_of()

    def pause(*_: object) -> None:
        time.sleep(chance.choice((0.0, 0.0, 0.01, 0.03)))

    for schedule, (chunks, order) in SCHEDULES.items():
        stages = load_stages(folder, mesh, chunks=chunks, order=order)
        for stage in stages:
            for layer in stage.layers:
                layer.register_forward_pre_hook(pause)
                layer.register_forward_hook(lambda _, __, x: x.register_hook(pause) and None)
        pipeline = Pipeline(stages, mesh, schedule=schedule, num_microbatches=4)
        for length in (7, 5, 7):
            reset(stages)
            loss = pipeline.step(ids[:, :length], targets[:, :length])
        check_loss(loss, truth, 4, schedule)
        check_gradients(stages, mesh, truth, 4, schedule)


def test_late_stages_and_changing_lengths_neither_deadlock_nor_mix_up(cases: Cases) -> None:
    launch(delayed, 2, *cases["llama tied"], threads=1, timeout_s=60.0)


class CountedP2P(dist.P2POp):
    """A message of torch's engine."""

    made: list[str] = []  # noqa: RUF012

    def __init__(self, op: Any, *args: Any, **kwargs: Any) -> None:
        CountedP2P.made.append(op.__name__)
        super().__init__(op, *args, **kwargs)


def messages(folder: str, m: int) -> dict[str, tuple[int, int]]:
    mesh = init_mesh(pp=2)
    dist.P2POp = CountedP2P
    ids, targets = batch_of()
    found = {}
    for schedule, (chunks, order) in SCHEDULES.items():
        stages = load_stages(folder, mesh, chunks=chunks, order=order)
        pipeline = Pipeline(stages, mesh, schedule=schedule, num_microbatches=m)
        for _ in range(2):
            CountedP2P.made = []
            pipeline.step(ids, targets)
        found[schedule] = tuple(CountedP2P.made.count(name) for name in ("isend", "irecv"))
    return found


def test_number_of_messages(cases: Cases) -> None:
    """Each boundary between ranks is crossed once forward and once back a micro-batch."""
    m = 3
    for found in launch(messages, 2, cases["llama"][0], m, threads=1):
        # Of the 3 boundaries of 4 stages, the V keeps the middle one on rank 1.
        crossed = {"gpipe": 1, "1f1b": 1, "interleaved": 3, "zero_bubble": 3, "zero_bubble_v": 2}
        assert found == {name: (m * count, m * count) for name, count in crossed.items()}
