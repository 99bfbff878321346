"""torch.distributed.checkpoint never keeps one rank's shards: it has dense tensors, or refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as helpers

from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.saving.save import restore, save
from pyparallel.testing import assert_equal
from pyparallel.training.data import data_parallel
from tests.transformers_models import build, inputs

ROOT = Path(__file__).parents[2]


class App(dcp.stateful.Stateful):
    """What torch's tutorial hands to dcp.save."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = helpers.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        helpers.set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )


# Fused and stacked projections, Conv1D, tied weights, a second name for a bias.
FAMILIES = ("llama", "gpt2", "phi3", "bert")
# The helpers' optimizer states go by names; an optimizer's own by numbers.
BY_NAMES = ("llama",)


def stepped(name: str, mesh: Mesh | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after a step of AdamW, cut or dense."""
    model = build(name) if mesh is None else parallelize(build(name), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**inputs(model)).loss.backward()
    optimizer.step()
    return model, optimizer


def saved(out: Path) -> None:
    mesh = init_mesh(tp=4)
    for name in FAMILIES:
        model, optimizer = stepped(name, mesh)
        state = model.state_dict()
        kinds = {key: (type(value), value.data_ptr()) for key, value in state.items()}
        dcp.save({"model": state, "step": 3}, checkpoint_id=str(out / f"{name} model"))
        assert {key: (type(value), value.data_ptr()) for key, value in state.items()} == kinds
        if name in BY_NAMES:
            dcp.save({"app": App(model, optimizer)}, checkpoint_id=str(out / f"{name} app"))
        else:
            plain = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            dcp.save(plain, checkpoint_id=str(out / f"{name} app"))
        # The dense model's tensors, read without us.
        whole = build(name).state_dict()
        torch.save(joined(model, whole), out / f"{name} {mesh.world.rank}.pt")


def joined(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts in their places of otherwise empty dense tensors."""
    shardings = named_shardings(model)
    places = {}
    for name, value in model.named_parameters():
        places[name] = torch.full_like(whole[name], float("nan"))
        sharding = shardings[name]
        rank = 0 if sharding.dim is None else torch.distributed.get_rank()
        held = ((None,),) if sharding.dim is None else sharding.ranges[rank]
        parts = (
            [value] if sharding.dim is None else value.split([b - a for a, b in held], sharding.dim)
        )
        for piece, part in zip(held, parts, strict=True):
            if sharding.dim is None:
                places[name].copy_(part)
            else:
                places[name].narrow(sharding.dim, piece[0], piece[1] - piece[0]).copy_(part)
    return {name: value.detach() for name, value in places.items()}


def read_dense(out: Path) -> None:
    """One process, the dense model: every element is one that some rank had."""
    for name in FAMILIES:
        dense = build(name)
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.fill_(float("nan"))
        dcp.load({"model": dense.state_dict()}, checkpoint_id=str(out / f"{name} model"))
        parts = [torch.load(out / f"{name} {rank}.pt", weights_only=True) for rank in range(4)]
        for key, value in dense.named_parameters():
            truth = parts[0][key]
            for part in parts[1:]:
                truth = torch.where(truth.isnan(), part[key], truth)
            assert_equal(value.detach(), truth, f"{name} {key}")


def read(model: nn.Module, optimizer: torch.optim.Optimizer, name: str, out: Path) -> None:
    """Weights and moments of what was saved, by the parameters' names or by their numbers."""
    folder = str(out / f"{name} app")
    if name in BY_NAMES:
        dcp.load({"app": App(model, optimizer)}, checkpoint_id=folder)
        return
    # A step makes room for the moments.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    optimizer.load_state_dict(state["optimizer"])


def read_elsewhere(out: Path) -> None:
    """Three ranks: weights and moments are the slices of what four ranks have saved."""
    mesh = init_mesh(tp=3)
    for name in FAMILIES:
        dense, model = build(name), parallelize(build(name), mesh)
        whole, optimizer = (torch.optim.AdamW(m.parameters(), lr=0.5) for m in (dense, model))
        read(dense, whole, name, out)
        read(model, optimizer, name, out)
        theirs, shardings = dict(dense.named_parameters()), named_shardings(model)
        for key, value in model.named_parameters():
            part = shardings[key].split(theirs[key].detach(), mesh.tp.rank)
            assert_equal(value.detach(), part, f"{name} {key}")
            for moment in ("exp_avg", "exp_avg_sq"):
                part = shardings[key].split(whole.state[theirs[key]][moment], mesh.tp.rank)
                assert_equal(optimizer.state[value][moment], part, f"{name} {key} {moment}")
        assert float(optimizer.state[value]["exp_avg_sq"].max()) > 0
        assert optimizer.param_groups[0]["lr"] == 0.01


def test_any_mesh_reads_dense_tensors(tmp_path: Path) -> None:
    launch(saved, 4, tmp_path, threads=1, timeout_s=120.0)
    read_dense(tmp_path)
    launch(read_elsewhere, 3, tmp_path, threads=1, timeout_s=120.0)


def refused(out: Path) -> None:
    mesh = init_mesh(dp=2, tp=2)
    model, optimizer = stepped("llama", mesh)
    fsdp = data_parallel(parallelize(build("llama"), mesh), mesh, engine="fsdp")
    folder = str(out / "dcp")

    def refuses(words: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError) as error:
            call(*args, **options)
        assert words in str(error.value), error.value
        assert "\n" not in str(error.value)
        assert "use pyparallel." in str(error.value)

    refuses("and that FSDP has cut too", dcp.save, fsdp.state_dict(), checkpoint_id=folder)
    refuses("and that FSDP has cut too", dcp.load, fsdp.state_dict(), checkpoint_id=folder)
    refuses(
        "copies (dcp.async_save) would not",
        dcp.async_save,
        model.state_dict(),
        checkpoint_id=folder,
    )
    shards = {"shards": tuple(model.state_dict().values())}
    refuses("expected shards in lists", dcp.save, shards, checkpoint_id=folder)
    for options in ({"full_state_dict": True}, {"cpu_offload": True}):
        asked = {"options": helpers.StateDictOptions(**options)}
        refuses("a module that is cut", helpers.get_model_state_dict, model, **asked)
        refuses("a module that is cut", helpers.get_state_dict, fsdp, optimizer, **asked)
        refuses("a module that is cut", helpers.get_optimizer_state_dict, model, optimizer, **asked)
    rounded = ColumnParallelLinear(6, 4, group=mesh.tp)
    rounded.quantize_weight()
    refuses("and rounded for inference", dcp.save, rounded.state_dict(), checkpoint_id=folder)
    stages = init_mesh(pp=2, tp=2)
    model, optimizer = stepped_stage(stages)
    refuses(
        "of 2 stages numbers its own", dcp.save, {"o": optimizer.state_dict()}, checkpoint_id=folder
    )
    assert not (out / "dcp").exists()
    dcp.save(model.state_dict(), checkpoint_id=str(out / "stages"))


def another_ranks(out: Path) -> None:
    """Rank 0's torch.save, read by all: the parts are even, and only their owner's fit."""
    group = init_mesh(tp=2).tp
    whole = nn.Linear(6, 4)
    linear = ColumnParallelLinear.from_dense(whole, group=group)
    file = out / f"{group.rank}.pt"
    torch.save(nn.Sequential(linear).state_dict(), file)
    state = torch.load(file, weights_only=True)
    nn.Sequential(linear).load_state_dict(state)
    torch.distributed.barrier()
    theirs = torch.load(out / f"{1 - group.rank}.pt", weights_only=True)
    expected = f"0.weight: expected rank {group.rank}'s part of 2, or the dense tensor, got rank"
    with pytest.raises(RuntimeError, match=expected):
        nn.Sequential(linear).load_state_dict(theirs)
    nn.Sequential(linear).load_state_dict(nn.Sequential(whole).state_dict())


def test_another_ranks_part_is_refused(tmp_path: Path) -> None:
    launch(another_ranks, 2, tmp_path, threads=1, timeout_s=60.0)


def stepped_stage(mesh: Mesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = parallelize(build("llama"), mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_shards_are_refused(tmp_path: Path) -> None:
    launch(refused, 4, tmp_path, threads=1, timeout_s=120.0)
    dense = build("llama")
    whole = {name: value.clone() for name, value in dense.state_dict().items()}
    dcp.load(dense.state_dict(), checkpoint_id=str(tmp_path / "stages"))
    for name, value in dense.named_parameters():
        # A step of AdamW by gradients of one: it moved all weights.
        assert float((value - whole[name]).abs().min()) > 0, name


def untouched(out: Path) -> None:
    """What is whole, or torch's own shards, goes on; and so do ours, by our own way."""
    mesh = init_mesh(dp=2, tp=2)
    column = ColumnParallelLinear(6, 5, group=mesh.tp)
    row = RowParallelLinear(5, 6, group=mesh.tp)
    dense = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.9)
    dense(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    state = {"dense": dense.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    # A row-parallel bias is whole on every rank.
    state["bias"] = row.state_dict()["bias"]
    dcp.save(state, checkpoint_id=str(out / "dcp"))
    dcp.load(state, checkpoint_id=str(out / "dcp"))
    assert helpers.get_model_state_dict(dense).keys() == {"weight", "bias"}
    sharded = data_parallel(nn.Sequential(nn.Linear(6, 6)), mesh, engine="fsdp")
    dcp.save(helpers.get_model_state_dict(sharded), checkpoint_id=str(out / "fsdp"))
    # A rank's own shards stay tensors that it may keep by itself.
    column.load_state_dict(column.state_dict())
    torch.save(column.state_dict(), out / f"{mesh.world.rank}.pt")
    kept = torch.load(out / f"{mesh.world.rank}.pt", weights_only=True)
    assert torch.equal(kept["weight"], column.weight)
    model = nn.Sequential(column, row)
    save(model, out / "ours", mesh)
    before = column.weight.detach().clone()
    column.weight.data.zero_()
    restore(model, out / "ours", mesh)
    assert torch.equal(column.weight, before)


def test_what_is_whole_is_untouched(tmp_path: Path) -> None:
    launch(untouched, 4, tmp_path, threads=1, timeout_s=120.0)


def test_checkpoints_that_are_imported_after_the_state_was_taken(tmp_path: Path) -> None:
    # In a launcher of its own: ranks begin with what those before them have imported.
    program = (
        "import sys, pathlib, pyparallel\n"
        "from tests.layers.late_import import save_late\n"
        "pyparallel.launch(save_late, 2, pathlib.Path(sys.argv[1]), threads=1, timeout_s=60.0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=ROOT)
