"""The global norm: every element of the dense gradient counts once, whoever holds it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.cut.shard import Sharding
from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.testing import integers
from pyparallel.training.data import data_parallel
from pyparallel.training.grad_norm import clip_grad_norm_, grad_norm

ORDERS = (2.0, 1.0, 3.0, math.inf)


class Toy(nn.Module):
    """A layer of each cut, a replicated one, a scalar, and a parameter without a gradient."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.column = ColumnParallelLinear(6, 7, group=group)
        self.row = RowParallelLinear(5, 3, group=group)
        # One KV head on every rank.
        self.qkv = QKVParallelLinear(6, 4, 1, 2, group=group)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))


def dense_gradients(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Small integers, so that powers of up to 3 sum exactly in fp32."""
    shapes = {
        "column.weight": (7, 6),
        "column.bias": (7,),
        "row.weight": (3, 5),
        "row.bias": (3,),
        "qkv.weight": (12, 6),
        "qkv.bias": (12,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "scale": (),
    }
    return {
        name: integers(*shape, seed=i, low=-3, high=3).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def give_gradients(model: nn.Module, mesh: Mesh, dtype: torch.dtype = torch.float32) -> None:
    """Every rank its part of the dense gradients."""
    for name, dense in dense_gradients(dtype).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        shardings = getattr(module, "shardings", {})
        part = shardings[leaf].split(dense, mesh.tp.rank) if leaf in shardings else dense
        model.get_parameter(name).grad = part.clone()


def expected(order: float, *, without: str = "") -> float:
    found = dense_gradients()
    found.pop(without, None)
    every = torch.cat([g.flatten() for g in found.values()]).double()
    return float(torch.linalg.vector_norm(every, order))


def norms(dp: int, pp: int, cp: int, tp: int) -> None:
    mesh = init_mesh(dp=dp, pp=pp, cp=cp, tp=tp)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Toy(mesh.tp).to(dtype)
        give_gradients(model, mesh, dtype)
        for order in ORDERS:
            norm = grad_norm(model, mesh, norm_type=order)
            # Stages hold different layers; here each holds the same.
            whole = expected(order) * (1 if math.isinf(order) else pp ** (1 / order))
            assert abs(float(norm) - whole) < 1e-6 * whole, (mesh, order, dtype)
            assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_stages(mesh)
    check_clip(mesh)
    check_collectives(mesh)


def check_stages(mesh: Mesh) -> None:
    """Several stages of this rank; a copy of another stage's parameter does not count."""
    model = Toy(mesh.tp)
    give_gradients(model, mesh)
    model.row.tied_copies = {"weight": "elsewhere.weight"}
    lone = nn.Linear(2, 1, bias=False)
    lone.weight.grad = torch.tensor([[3.0, 4.0]])
    copied = float(dense_gradients()["row.weight"].square().sum())
    whole = math.sqrt((expected(2.0) ** 2 - copied + 25) * mesh.pp.size)
    assert abs(float(grad_norm([model, lone], mesh)) - whole) < 1e-6 * whole


def check_clip(mesh: Mesh) -> None:
    model = Toy(mesh.tp)
    give_gradients(model, mesh)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    whole = float(grad_norm(model, mesh))
    assert float(clip_grad_norm_(model, whole * 2, mesh)) == whole
    for name, grad in before.items():
        assert torch.equal(model.get_parameter(name).grad, grad), name
    assert float(clip_grad_norm_(model, whole / 4, mesh)) == whole
    factor = (whole / 4) / (whole + 1e-6)
    for name, grad in before.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad * factor, rtol=1e-6, atol=0)
    assert float(clip_grad_norm_(model, 0.0, mesh)) > 0
    assert float(grad_norm(model, mesh)) == 0
    # On one rank alone; all of them have to hear of it.
    if mesh.world.rank == mesh.world.size - 1:
        model.column.weight.grad.fill_(math.inf)
    if mesh.tp.size * mesh.pp.size == mesh.world.size:
        with pytest.raises(RuntimeError, match=r"norm of order .* is inf"):
            clip_grad_norm_(model, 1.0, mesh, error_if_nonfinite=True)


def check_collectives(mesh: Mesh) -> None:
    model = Toy(mesh.tp)
    give_gradients(model, mesh)
    with count_collectives() as counts:
        clip_grad_norm_(model, 1.0, mesh)
    axes = sum(group.size > 1 for group in (mesh.tp, mesh.pp))
    assert {n: c for n, c in counts.items() if n == "all_reduce"} == (
        {"all_reduce": axes} if axes else {}
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 1, 3), (1, 2, 1, 2), (2, 1, 2, 1)])
def test_everything_counts_once(sizes: tuple[int, ...]) -> None:
    world = math.prod(sizes)
    if world == 1:
        norms(*sizes)
    else:
        launch(norms, world, *sizes, threads=1, timeout_s=60.0)


def refusals() -> list[str]:
    mesh = init_mesh(dp=2)
    model = nn.Linear(4, 4)
    said = []
    for call in (
        lambda: grad_norm(model, mesh, norm_type=0.0),
        lambda: grad_norm(model, mesh, norm_type=math.nan),
        lambda: clip_grad_norm_(model, -1.0, mesh),
        lambda: clip_grad_norm_(model, math.nan, mesh),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    fully_shard(model, mesh=mesh.device_mesh["dp"])
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError) as error:
        grad_norm(model, mesh)
    said.append(str(error.value))
    return said


def test_bad_input_is_one_clear_line() -> None:
    expected_words = (
        "norm_type: expected a number above 0, got 0.0",
        "norm_type: expected a number above 0, got nan",
        "max_norm: expected 0 or more, got -1.0",
        "max_norm: expected 0 or more, got nan",
        "weight: expected a gradient cut over mesh.data_mesh",
    )
    for said in launch(refusals, 2, threads=1, timeout_s=60.0):
        for words, line in zip(expected_words, said, strict=True):
            assert words in line
            assert "\n" not in line


def test_first_held_is_a_partition() -> None:
    """Overlapping, nested, equal and empty ranges, several a rank."""
    cuts = Sharding(
        0,
        10,
        (((0, 4), (8, 10)), ((2, 6), (8, 10)), ((0, 0),), ((0, 10),), ((6, 8), (1, 3))),
    )
    seen: list[int] = []
    for rank, held in enumerate(cuts.ranges):
        places = [place for start, stop in held for place in range(start, stop)]
        for start, stop in cuts.first_held(rank):
            assert start < stop
            seen += places[start:stop]
    assert sorted(seen) == list(range(10))


def uneven_fsdp() -> None:
    """Axes that don't divide by the ranks, replicas within an FSDP shard, ranks with nothing."""
    mesh = init_mesh(dp=2, tp=2)
    model = Toy(mesh.tp)
    # FSDP takes no scalar.
    model.scale = None
    model = data_parallel(model, mesh, engine="fsdp")
    dense = Toy(mesh.tp)
    give_gradients(dense, mesh)
    for name, parameter in model.named_parameters():
        whole = dense.get_parameter(name).grad
        if whole is not None:
            sharded = parameter.detach().clone()
            size = sharded.to_local().shape[0]
            start = mesh.data.rank * -(-whole.shape[0] // mesh.data.size)
            sharded.to_local().copy_(whole[start : start + size])
            parameter.grad = sharded
    for order in ORDERS:
        norm = float(grad_norm(model, mesh, norm_type=order))
        assert abs(norm - expected(order, without="scale")) < 1e-6 * norm, order


def test_fsdp_shards_count_once() -> None:
    launch(uneven_fsdp, 4, threads=1, timeout_s=60.0)
