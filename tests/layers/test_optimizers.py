"""Scalers and optimizers that meet shards: as on the dense model, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import named_shardings, parallelize
from tests.transformers_models import build, inputs


def scaled(sizes: dict[str, int], fused: bool) -> tuple[bool, float]:
    """An infinity in one rank's shard: whether this rank's weights moved, and the scale afterwards."""
    mesh = init_mesh(**sizes)
    layer = ColumnParallelLinear(8, 6, group=mesh.tp)
    # A copy is a sharded module too.
    layer = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(layer(torch.ones(2, 8)).sum()).backward()
    if mesh.world.rank == mesh.world.size - 1:
        layer.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer) if not fused else None
    scaler.step(optimizer)
    scaler.update()
    moved = not torch.equal(before, layer.weight)
    # The next, good step is taken by all.
    optimizer.zero_grad()
    scaler.scale(layer(torch.ones(2, 8)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, layer.weight)
    return moved, scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
def test_an_infinity_stops_every_rank(fused: bool) -> None:
    for sizes in ({"tp": 2}, {"tp": 3}, {"tp": 2, "pp": 2}):
        ranks = 1
        for size in sizes.values():
            ranks *= size
        assert launch(scaled, ranks, sizes, fused, threads=1) == [(False, 32.0)] * ranks


class Lion(torch.optim.Optimizer):
    """Elementwise, and not torch's."""

    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.betas = (0.9, 0.99)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * (self.betas[0] * m + (1 - self.betas[0]) * p.grad).sign())
                m.lerp_(p.grad, 1 - self.betas[1])


class Lars(Lion):
    """Scales a parameter's step by its norm."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad * p.norm() / (p.grad.norm() + 1e-9))


class Clipped(Lion):
    """Clips by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(0.01 * p.grad / (norm + 1.0))


class SubAdam(torch.optim.Adam):
    pass


def elementwise(kinds: list[str]) -> None:
    mesh = init_mesh(tp=2)
    for kind in kinds:
        make = {"Lion": Lion, "SubAdam": SubAdam}.get(kind) or getattr(torch.optim, kind)
        results = []
        for cut in (False, True):
            model = build("llama tied")
            if cut:
                model = parallelize(model, mesh)
            optimizer = make(model.parameters(), lr=0.01)
            for _ in range(2):
                optimizer.zero_grad()
                model(**inputs(model)).loss.backward()
                optimizer.step()
            results.append(model)
        for name, sharding in named_shardings(results[1]).items():
            whole: Tensor = results[0].get_parameter(name).detach()
            part = sharding.split(whole, mesh.tp.rank)
            ours = results[1].get_parameter(name).detach()
            # Adam divides small gradients by small ones: a few elements move another way.
            far = ((ours - part).abs() > 1e-3).float().mean()
            assert far < 0.02, f"{kind} {name} {far}"


def test_elementwise_ones_keep_working() -> None:
    launch(elementwise, 2, ["SGD", "AdamW", "Lion", "SubAdam"], threads=1)


def refused() -> None:
    from transformers.optimization import Adafactor as OldAdafactor

    mesh = init_mesh(tp=2)
    for make in (RowParallelLinear, ColumnParallelLinear):
        for kind, options in (
            (torch.optim.Adafactor, {}),
            (torch.optim.Muon, {}),
            (torch.optim.LBFGS, {}),
            (OldAdafactor, {}),
            (Lars, {}),
            (Clipped, {}),
        ):
            layer = make(8, 6, False, group=mesh.tp)
            optimizer = kind(layer.parameters(), **options)
            layer.weight.grad = torch.ones_like(layer.weight)
            before = layer.weight.detach().clone()
            with pytest.raises(
                ValueError, match=rf"{kind.__name__}: .*{make.__name__}.weight"
            ) as caught:
                optimizer.step(lambda: 0.0)
            assert "\n" not in str(caught.value)
            assert torch.equal(before, layer.weight) and not optimizer.state
    # What is not cut is nobody's business.
    dense = nn.Linear(8, 6)
    dense.weight.grad = torch.ones_like(dense.weight)
    torch.optim.Adafactor(dense.parameters()).step()
    alone = RowParallelLinear(8, 6, False, group=init_mesh(tp=2).dp)
    alone.weight.grad = torch.ones_like(alone.weight)
    torch.optim.Muon(alone.parameters()).step()


def test_those_that_need_the_whole_are_named() -> None:
    launch(refused, 2, threads=1)
