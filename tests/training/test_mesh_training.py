"""Whole training steps on meshes of all four axes: loss, every gradient, norm and the next weights.

The meshes are drawn at random, once and for all, among those of 4, 6 and 8 ranks with at least two
axes; so are the schedule, the engine of data parallelism, sequence parallelism and recomputation.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from pyparallel.comm.rendezvous import gather_objects
from pyparallel.launch import launch
from pyparallel.mesh import AXES, Mesh, init_mesh
from pyparallel.models.load import load_stages
from pyparallel.testing import assert_equal, poisoned_empty
from pyparallel.training.data import data_parallel
from pyparallel.training.grad_norm import clip_grad_norm_
from pyparallel.training.pipeline import Pipeline
from pyparallel.training.pipeline_schedules import schedule_of
from tests.training.training_truth import (
    BATCH,
    Truth,
    check_grads,
    check_loss,
    check_norm,
    check_stepped,
    optimizer_of,
    targets,
    text,
    truth_of,
    whole,
)
from tests.transformers_models import build

LAYERS = 5
# How many meshes of how many ranks.
DRAWN = {4: 4, 6: 3, 8: 5}


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    schedule: str
    chunks: int
    engine: str
    sequence_parallel: bool
    recompute: str
    shares: tuple[int, ...] | None = None

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))
        return sizes if self.shares is None else f"{sizes} shares={self.shares}"


# Chosen, since none of the drawn ones has a split backward beside replicas, nor unequal shares; four
# ranks of these have three KV heads.
CHOSEN = {
    8: [
        Case((2, 2, 1, 2), "zero_bubble", 1, "ddp", True, "none"),
        Case((2, 1, 1, 4), "gpipe", 1, "fsdp", False, "layers", (5, 3, 1, 2)),
        Case((1, 2, 2, 2), "1f1b", 1, "ddp", False, "none", (3, 1)),
    ],
    6: [Case((2, 1, 1, 3), "gpipe", 1, "fsdp", True, "attention", (5, 3, 1))],
    4: [
        Case((2, 2, 1, 1), "interleaved", 2, "fsdp", False, "layers"),
        Case((1, 2, 1, 2), "interleaved", 2, "ddp", True, "none", (3, 1)),
    ],
}


def drawn(world: int) -> list[Case]:
    """The cases of ``world`` ranks."""
    chance = random.Random(world)
    possible = [
        sizes
        for sizes in itertools.product(range(1, 5), repeat=4)
        if math.prod(sizes) == world
        and sum(size > 1 for size in sizes) > 1
        and BATCH % sizes[0] == 0
    ]
    cases = CHOSEN.get(world, [])[:]
    for sizes in chance.sample(possible, DRAWN[world]):
        schedule, chunks = "gpipe", 1
        if sizes[1] == 2:
            schedule, chunks = chance.choice(
                [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble_v", 2)]
            )
        splits = schedule_of(schedule).splits
        cases.append(
            Case(
                sizes,
                schedule,
                chunks,
                "ddp" if splits else chance.choice(["ddp", "fsdp"]),
                chance.random() < 0.5,
                "none" if splits else chance.choice(["none", "attention", "layers"]),
            )
        )
    return cases


def check(case: Case, folder: str, truth: Truth) -> Tensor:
    """The loss of a step on the case's mesh, all of which is the dense model's."""
    mesh = init_mesh(**dict(zip(AXES, case.sizes, strict=True)), shares=case.shares)
    stages = load_stages(
        folder,
        mesh,
        chunks=case.chunks,
        order=schedule_of(case.schedule).order,
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,
    )
    for stage in stages:
        stage.train()
    wrapped = [data_parallel(stage, mesh, engine=case.engine) for stage in stages]
    parts = BATCH // mesh.dp.size
    pipeline = Pipeline(
        wrapped,
        mesh,
        schedule=case.schedule,
        num_microbatches=min(parts, 2 * mesh.pp.size) if mesh.pp.size > 1 else 1,
    )
    rows = slice(mesh.dp.rank * parts, (mesh.dp.rank + 1) * parts)
    loss = pipeline.step(text()[rows], targets()[rows])
    check_loss(loss, truth, mesh, str(case))
    for stage in stages:
        check_grads(stage, truth, mesh, str(case))
    norm = clip_grad_norm_(wrapped, truth.clipped, mesh)
    check_norm(norm, 2.0, truth, mesh, str(case))
    for stage in stages:
        optimizer_of(stage).step()
        check_stepped(stage, truth, mesh, str(case))
    check_copies(stages, mesh)
    return loss


def check_copies(stages: list[nn.Module], mesh: Mesh) -> None:
    """A tied weight that two stages hold has the same bits in both after the step."""
    held = [whole(s.tied_weight) for s in stages if s.tied_weight is not None]
    everyone = gather_objects(mesh.device_mesh.get_group("pp"), held)
    copies = [weight for weights in everyone for weight in weights]
    assert len(copies) in (0, 2)
    if copies:
        assert_equal(copies[0], copies[1], "tied weights")


def steps(cases: list[Case], folder: str, truth: Truth) -> int:
    with poisoned_empty():
        for case in cases:
            check(case, folder, truth)
    return len(cases)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Truth]:
    """The model's folder, and what a step of it gives."""
    model, folder = build("llama tied", num_hidden_layers=LAYERS), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder), truth_of(model)


@pytest.mark.parametrize("world", [4, 6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_step_on_random_meshes_is_the_dense_models(saved: tuple[str, Truth], world: int) -> None:
    cases = drawn(world)
    told = launch(steps, world, cases, *saved, threads=1)
    assert told == [len(cases)] * world


def test_the_drawn_meshes_use_everything() -> None:
    cases = [case for world in DRAWN for case in drawn(world)]
    assert len(cases) >= 10
    for axis in range(4):
        assert sum(case.sizes[axis] > 1 for case in cases) >= 3
    assert sum(case.sequence_parallel and case.sizes[3] > 1 for case in cases) >= 2
    assert {case.engine for case in cases} == {"ddp", "fsdp"}
    assert len({case.schedule for case in cases}) >= 3
    assert any(sum(size > 1 for size in case.sizes) >= 3 for case in cases)
