"""Torch's norm of gradients that are shards: the dense model's, or refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

# By name and before the layers are imported, as users' scripts have them.
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from pyparallel.comm.collectives import count_collectives
from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.training.data import data_parallel
from pyparallel.training.grad_norm import grad_norm
from tests.training.test_grad_norm import ORDERS, Toy, expected, give_gradients
from tests.transformers_models import build, inputs


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def norms(tp: int) -> None:
    mesh = init_mesh(tp=tp)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Toy(mesh.tp).to(dtype)
        give_gradients(model, mesh, dtype)
        for order in ORDERS:
            whole = expected(order)
            norm = clip_grad_norm_(model.parameters(), 2 * whole, order)
            assert abs(float(norm) - whole) < 1e-6 * whole, (order, dtype)
            assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            # Views and parts of a model are known too.
            for alias in (gradients_of(model), [g.detach() for g in gradients_of(model)]):
                assert torch.equal(get_total_norm(alias, order), norm)
    model = Toy(mesh.tp)
    give_gradients(model, mesh)
    before = [g.clone() for g in gradients_of(model)]
    whole = expected(2.0)
    with count_collectives() as counts:
        norm = get_total_norm(gradients_of(model))
        clip_grads_with_norm_(model.parameters(), whole / 4, norm)
    assert {n: c for n, c in counts.items() if n == "all_reduce"} == {"all_reduce": 1}
    for clipped, gradient in zip(gradients_of(model), before, strict=True):
        # By torch's own steps.
        assert torch.equal(clipped, gradient * ((whole / 4) / (norm + 1e-6)))
    clip_grad_norm_([model.norm.weight, model.row.weight], 1.0)
    # What is not cut is torch's own.
    lone = nn.Linear(2, 1, bias=False)
    lone.weight.grad = torch.tensor([[3.0, 4.0]])
    with count_collectives() as counts:
        assert float(clip_grad_norm_(lone.parameters(), 100.0, 0.5)) > 5
        assert float(clip_grad_norm_(iter([lone.weight]), 10.0)) == 5
    assert not counts
    # On one rank alone; all of them have to hear of it.
    if mesh.tp.rank == tp - 1:
        model.column.weight.grad.fill_(math.inf)
    with pytest.raises(RuntimeError, match=r"norm of order .* is inf"):
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("tp", [2, 3])
def test_the_dense_models_norm(tp: int) -> None:
    launch(norms, tp, tp, threads=1, timeout_s=60.0)


def whole_models() -> None:
    mesh = init_mesh(dp=2, tp=2)
    for case in ("llama", "llama tied", "gpt2", "phi3"):
        dense = build(case)
        dense(**inputs(dense)).loss.backward()
        truth = float(clip_grad_norm_(dense.parameters(), 1e9))
        model = parallelize(build(case), mesh)
        trained = data_parallel(model, mesh)
        # Every rank of dp has all tokens: the gradients' sum is twice the dense one's.
        trained(**inputs(model)).loss.backward()
        norm = clip_grad_norm_(trained.parameters(), 1e9)
        assert torch.equal(norm, grad_norm(trained, mesh)), case
        # The gradients of fp32 sums of some hundred terms.
        assert abs(float(norm) - 2 * truth) < 1e-4 * truth, case


def test_whole_models() -> None:
    launch(whole_models, 4, threads=1, timeout_s=120.0)


def refused() -> list[str]:
    mesh = init_mesh(dp=2, tp=2)
    toy = Toy(mesh.tp)
    give_gradients(toy, mesh)
    other = ColumnParallelLinear(6, 4, group=mesh.dp)
    other.weight.grad = torch.ones_like(other.weight)
    fsdp = data_parallel(ColumnParallelLinear(6, 8, group=mesh.tp), mesh, engine="fsdp")
    fsdp(torch.ones(2, 6)).sum().backward()
    piped = init_mesh(pp=2, tp=2)
    stage = Toy(piped.tp)
    give_gradients(stage, piped)
    said = []
    for parameters, order in (
        (toy.parameters(), 0.0),
        ([*toy.parameters(), *other.parameters()], 2.0),
        (fsdp.parameters(), 2.0),
        (stage.parameters(), 2.0),
    ):
        with pytest.raises(ValueError) as error:
            clip_grad_norm_(parameters, 1.0, order)
        said.append(str(error.value))
    return said


def test_what_needs_the_mesh_is_refused() -> None:
    words = (
        "norm_type: expected a number above 0",
        "these are cut over 2 groups of ranks; use pyparallel.clip_grad_norm_(model, max_norm, mesh)",
        "FSDP has cut them too; use pyparallel.clip_grad_norm_(model, max_norm, mesh)",
        "they are a stage's of a pipeline; use pyparallel.clip_grad_norm_(model, max_norm, mesh)",
    )
    for said in launch(refused, 4, threads=1, timeout_s=60.0):
        for expected_words, line in zip(words, said, strict=True):
            assert expected_words in line
            assert "\n" not in line


def accelerated() -> None:
    from accelerate import Accelerator

    mesh = init_mesh(tp=2)
    model = Toy(mesh.tp)
    give_gradients(model, mesh)
    norm = Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 1.0)
    assert abs(float(norm) - expected(2.0)) < 1e-6 * expected(2.0)


def test_accelerate_asks_torch() -> None:
    launch(accelerated, 2, threads=1, timeout_s=60.0)
