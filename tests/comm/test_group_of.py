"""Groups from torch's own objects: the same results, one group an object, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import pyparallel
from pyparallel.comm.group import Group
from pyparallel.comm.group_of import group_of
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.testing import assert_as_dense, integers, normals, run_ranks
from tests.transformers_models import build

TOKENS, INNER, WIDTH = 3, 10, 7


def objects() -> Iterator[tuple[str, Any]]:
    """Every kind of object that a program may have for a group, of all ranks and of two."""
    size = dist.get_world_size()
    yield "the world", dist.group.WORLD
    yield "a group of all", dist.new_group(range(size))
    yield "a mesh without names", init_device_mesh("cpu", (size,))
    yield "a mesh of one name", init_device_mesh("cpu", (size,), mesh_dim_names=("model",))
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "model"))
        yield "a row", square["model"]
        yield "a column", square["replica"]
        yield "a row's group", square.get_group("model")
        yield "pairs", dist.new_subgroups(2)[0]


def dense_and_gradients(up: nn.Module, down: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = down(up(x))
    y.sum().backward()
    return [y.detach(), x.grad]


def linear_pair(given: Any, rank: int, size: int) -> None:
    """Small integers: every sum is exact, so the pair equals the dense one to the bit."""
    dense_up, dense_down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
    for seed, parameter in enumerate((*dense_up.parameters(), *dense_down.parameters())):
        parameter.data = integers(*parameter.shape, seed=seed)
    x = integers(TOKENS, WIDTH, seed=9)
    expected = dense_and_gradients(dense_up, dense_down, x)
    up = pyparallel.ColumnParallelLinear.from_dense(dense_up, group=given)
    down = pyparallel.RowParallelLinear.from_dense(dense_down, group=given)
    assert up.group is down.group is group_of(given)
    assert (up.group.rank, up.group.size) == (rank, size)
    for found, truth in zip(dense_and_gradients(up, down, x), expected, strict=True):
        assert torch.equal(found, truth)
    total = pyparallel.all_reduce(torch.ones(2), given)
    assert total.tolist() == [size, size]
    cut = pyparallel.all_gather(torch.full((1,), float(rank)), given)
    assert cut.tolist() == list(range(size))


def pairs_of_every_kind() -> list[str]:
    names = []
    for name, given in objects():
        group = given.get_group() if isinstance(given, DeviceMesh) else given
        linear_pair(given, dist.get_rank(group), group.size())
        names.append(name)
    return names


def every_layer(group: Group) -> None:
    """Each module that takes a group takes torch's; the world is this mesh's tp axis."""
    size, given = group.size, dist.group.WORLD
    modules = [
        pyparallel.ParallelMLP(8, 12, group=given).up_proj,
        pyparallel.ParallelAttention(8, 4, group=given).qkv_proj,
        pyparallel.QKVParallelLinear(8, 4, group=given),
        pyparallel.ParallelLMHead(8, 20, group=given),
        pyparallel.VocabParallelEmbedding(20, 8, group=given),
        pyparallel.SequenceParallelDropout(group=given),
        pyparallel.SequenceParallelLayerNorm(8, group=given),
        pyparallel.SequenceParallelRMSNorm(8, group=given),
    ]
    assert {module.group for module in modules} == {group_of(given)}
    own = normals(TOKENS, 20, seed=1).chunk(size, -1)[group.rank]
    losses = [
        pyparallel.vocab_parallel_cross_entropy(
            own.clone(), torch.tensor([0, 7, 19]), group=either, vocab_size=20
        )
        for either in (given, group)
    ]
    assert torch.equal(*losses)


def from_meshes() -> list[str]:
    """init_mesh of torch's mesh, its dimensions in any order and number; and parallelize on it."""
    size, told = dist.get_world_size(), []
    line = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    shapes = [(line, {"tp": size})]
    if size == 4:
        ranks = torch.arange(4).view(2, 2)
        shapes += [
            (DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "tp")), {"dp": 2, "tp": 2}),
            (DeviceMesh("cpu", ranks.T, mesh_dim_names=("tp", "cp")), {"cp": 2, "tp": 2}),
            (DeviceMesh("cpu", ranks.view(2, 1, 2), mesh_dim_names=("pp", "dp", "tp")), None),
        ]
    for device_mesh, sizes in shapes:
        if sizes is None:
            told.append(refused(lambda given=device_mesh: init_mesh(given, tp=2)))
            mesh = init_mesh(device_mesh)
            assert mesh.sizes == {"dp": 1, "pp": 2, "cp": 1, "tp": 2}
        else:
            mesh = init_mesh(device_mesh)
            assert mesh.sizes == {"dp": 1, "pp": 1, "cp": 1, "tp": 1} | sizes
        for axis in device_mesh.mesh_dim_names:
            assert group_of(device_mesh[axis]) is getattr(mesh, axis)
            assert group_of(device_mesh.get_group(axis)) is getattr(mesh, axis)
            assert group_of(mesh.device_mesh[axis]) is getattr(mesh, axis)
    mesh = init_mesh(line)
    model, ids = build("llama"), torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        dense = model(ids).logits
        truth = build("llama").double()(ids).logits
        cut = pyparallel.parallelize(model, mesh)(ids).logits
    assert_as_dense(cut, dense, truth, size, "logits")
    assert model.lm_head.group is mesh.tp
    return told


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusals() -> list[str]:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ranks = torch.arange(4).view(2, 2)
    half = dist.new_group([0, 1])
    few = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
    told = [
        refused(lambda: pyparallel.ColumnParallelLinear(4, 4, group=None)),
        refused(lambda: pyparallel.RowParallelLinear(4, 4, group=square)),
        refused(lambda: pyparallel.all_reduce(torch.ones(1), init_device_mesh("cpu", (2, 2)))),
        refused(lambda: init_mesh(init_device_mesh("cpu", (4,)))),
        refused(lambda: init_mesh(init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",)))),
        refused(lambda: init_mesh(DeviceMesh("cpu", ranks, mesh_dim_names=("tp", "dp")))),
        refused(lambda: init_mesh(few)),
        refused(lambda: init_mesh(square, device_type="cuda")),
        refused(lambda: init_mesh(4)),
    ]
    if dist.get_rank() >= 2:
        told.append(refused(lambda: pyparallel.all_reduce(torch.ones(1), half)))
        told.append(refused(lambda: pyparallel.VocabParallelEmbedding(4, 4, group=few)))
    return told


def everything() -> dict[str, list[str]]:
    pairs = pairs_of_every_kind()
    meshes = from_meshes()
    every_layer(init_mesh(tp=dist.get_world_size()).tp)
    return {
        "pairs": pairs,
        "meshes": meshes,
        "refused": refusals() if dist.get_world_size() == 4 else [],
    }


def test_two_ranks_and_every_kind_of_object():
    for told in launch(everything, 2, threads=1):
        assert len(told["pairs"]) == 4


def test_four_ranks_every_kind_of_object_and_what_is_refused():
    kinds = "expected a Group, a torch ProcessGroup or a DeviceMesh of one dimension"
    way = "such as init_mesh(tp=2).tp, or Group.single() for one rank alone"
    names = "device_mesh: expected dimensions called dp, pp, cp or tp"
    instead = "name them so (mesh_dim_names), or give one of them as group= where it is used"
    order = "device_mesh: expected the world's ranks 0 to 3 in the order of"
    make = "make it by init_device_mesh with its dimensions so"
    for rank, told in enumerate(launch(everything, 4, threads=1)):
        assert len(told["pairs"]) == 8
        assert told["meshes"] == [
            "tp: expected no sizes beside device_mesh, which has them, got tp=2"
        ]
        assert told["refused"][:9] == [
            f"group: {kinds}, got NoneType; {way}",
            "group: expected a DeviceMesh of one dimension, got 2: ('dp', 'tp'); choose one of them, "
            "such as mesh['tp']",
            "group: expected a DeviceMesh of one dimension, got 2: (0, 1); choose one of them, "
            "such as a mesh with mesh_dim_names",
            f"{names}, got none; {instead}",
            f"{names}, got ('fsdp',); {instead}",
            f"{order} dp x tp, the last fastest, got [0, 2, 1, 3]; {make}",
            f"{order} tp, the last fastest, got [0, 1]; {make}",
            "device_type: expected 'cpu', as device_mesh has it, got 'cuda'",
            "device_mesh: expected torch's DeviceMesh, got int; sizes are given by name, as in "
            "init_mesh(tp=2)",
        ]
        ours = "group: expected one that this rank is in, got"
        only = f"on rank {rank}; call this only on its ranks"
        assert told["refused"][9:] == (
            [
                f"{ours} a process group of others {only}",
                f"{ours} a DeviceMesh of the ranks [0, 1] {only}",
            ]
            if rank >= 2
            else []
        )


def shares_of_an_axis(group: Group) -> bool:
    return group_of(dist.group.WORLD) is group


def test_an_axis_keeps_its_shares():
    assert run_ranks(shares_of_an_axis, 2, shares=(3, 1)) == [True, True]
