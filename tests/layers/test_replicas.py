"""Torch's DDP and FSDP over ranks that hold other parts are refused; over replicas they work."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import assert_equal, integers
from tests.transformers_models import build


def model_of(mesh: Mesh) -> nn.Module:
    """Integers, as on one rank: [x] -> [y]."""
    first, second = nn.Linear(4, 6), nn.Linear(6, 4)
    with torch.no_grad():
        for seed, parameter in enumerate((*first.parameters(), *second.parameters())):
            parameter.copy_(integers(*parameter.shape, seed=seed))
    return nn.Sequential(
        ColumnParallelLinear.from_dense(first, group=mesh.tp),
        RowParallelLinear.from_dense(second, group=mesh.tp),
    )


def check(sizes: dict[str, int]) -> None:
    mesh = init_mesh(**sizes)
    model = model_of(mesh)
    before = deepcopy(model)
    others = f"got {', '.join(map(str, others_of(mesh)))}, which hold other parts of 0 than rank"
    whole_world = init_device_mesh("cpu", (mesh.world.size,))
    wraps = (
        lambda: DistributedDataParallel(model),
        lambda: DistributedDataParallel(model, device_mesh=whole_world),
        lambda: DistributedDataParallel(model, None, None, 0, True),
    )
    for wrap in wraps:
        with pytest.raises(ValueError, match=others) as error:
            wrap()
        assert "use pyparallel.data_parallel(model, mesh)" in str(error.value)
        assert "\n" not in str(error.value)
    if sizes.get("tp", 1) > 1:
        with pytest.raises(ValueError, match="hold other parts"):
            DistributedDataParallel(model, process_group=mesh.device_mesh.get_group("tp"))
    # Nothing was overwritten before it was refused.
    for ours, kept in zip(model.parameters(), before.parameters(), strict=True):
        assert_equal(ours, kept, "weights")
    for options in (
        {"process_group": mesh.data_mesh.get_group()},
        {"device_mesh": mesh.device_mesh["dp"]},
    ):
        wrapped = DistributedDataParallel(model, **options)
        wrapped(torch.full((2, 4), float(mesh.dp.rank))).sum().backward()
        for ours, kept in zip(model.parameters(), before.parameters(), strict=True):
            assert_equal(ours, kept, "weights")
        model.zero_grad()
    # What nobody has cut is torch's own business.
    DistributedDataParallel(nn.Linear(2, 2))
    if mesh.tp.size < 3:
        check_fsdp(mesh, others)


def check_fsdp(mesh: Mesh, others: str) -> None:
    # Behind the layers, as somebody does who needs it late.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

    model = model_of(mesh)
    before, attributes = deepcopy(model), [set(vars(module)) for module in model.modules()]
    whole_world = init_device_mesh("cpu", (mesh.world.size,))
    wraps = [
        lambda: fully_shard(model),
        lambda: fully_shard(model, mesh=whole_world),
        lambda: fully_shard([model[1], model[0]], mesh=whole_world),
        lambda: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda: FullyShardedDataParallel(model, device_mesh=whole_world),
    ]
    for wrap in wraps:
        with pytest.raises(ValueError, match="hold other parts") as error:
            wrap()
        assert "engine='fsdp'" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=others):
        fully_shard(model)
    for ours, kept in zip(model.parameters(), before.parameters(), strict=True):
        assert type(ours) is nn.Parameter
        assert_equal(ours, kept, "weights")
    for module, held in zip(model.modules(), attributes, strict=True):
        assert {name for name, value in vars(module).items() if value} <= held
    fully_shard(model, mesh=mesh.data_mesh)
    assert isinstance(model, FSDPModule)
    wanted = before(torch.full((2, 4), 1.0))
    assert_equal(model(torch.full((2, 4), 1.0)), wanted, "output")
    fully_shard(nn.Linear(2, 2))


def others_of(mesh: Mesh) -> list[int]:
    """The ranks at another place along tp or pp."""
    places = mesh.device_mesh.mesh
    alike = places[:, mesh.pp.rank, :, mesh.tp.rank].flatten().tolist()
    return [rank for rank in places.flatten().tolist() if rank not in alike]


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2, "tp": 2}, {"tp": 3}, {"pp": 2}], ids=str)
def test_other_parts_are_refused_and_replicas_are_not(sizes: dict[str, int]) -> None:
    ranks = 1
    for size in sizes.values():
        ranks *= size
    launch(check, ranks, sizes, threads=1, timeout_s=60.0)


def check_models(folder: str) -> None:
    """A model that parallelize() or load() has cut, with equal shards too, whose mesh nobody holds."""
    for model in (
        parallelize(build("llama"), init_mesh(tp=2)),
        parallelize(build("gpt2"), init_mesh(tp=2)),
        load(folder, init_mesh(tp=2)),
    ):
        with pytest.raises(ValueError, match=r"DistributedDataParallel: .* hold other parts of"):
            DistributedDataParallel(model)


def test_models_are_refused(tmp_path) -> None:
    build("llama").save_pretrained(tmp_path)
    launch(check_models, 2, str(tmp_path), threads=1, timeout_s=60.0)
