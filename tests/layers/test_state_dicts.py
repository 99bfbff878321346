"""torch.distributed.checkpoint never keeps one rank's shards: it refuses them by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as helpers

from pyparallel.launch import launch
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.saving.save import restore, save
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
        raise AssertionError("nothing was to be loaded")


def refused(out: Path) -> None:
    mesh = init_mesh(dp=2, tp=2)
    model = parallelize(build("llama"), mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**inputs(model)).loss.backward()
    optimizer.step()
    fsdp = data_parallel(parallelize(build("llama"), mesh), mesh, engine="fsdp")
    whole = helpers.StateDictOptions(full_state_dict=True)
    folder = str(out / "dcp")

    def refuses(words: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError) as error:
            call(*args, **options)
        assert words in str(error.value), error.value
        assert "\n" not in str(error.value)
        assert "use pyparallel." in str(error.value)

    part = "lm_head.weight is one rank's part of a ParallelLMHead.weight that is cut over 2; "
    head = {"lm_head.weight": model.state_dict()["lm_head.weight"]}
    refuses(f"{part}use pyparallel.save(", dcp.save, head, checkpoint_id=folder)
    refuses("is one rank's part", dcp.save, model.state_dict(), checkpoint_id=folder)
    refuses(f"model.{part}", dcp.save, {"step": 3, "model": head}, checkpoint_id=folder)
    refuses("is one rank's part", dcp.save, {"model": model}, checkpoint_id=folder)
    refuses("is one rank's part", dcp.save, fsdp.state_dict(), checkpoint_id=folder)
    refuses("is one rank's part", dcp.save, {"o": optimizer.state_dict()}, checkpoint_id=folder)
    refuses("is one rank's part", dcp.async_save, model.state_dict(), checkpoint_id=folder)
    refuses(f"{part}use pyparallel.restore(", dcp.load, head, checkpoint_id=folder)
    cut = "expected a module that is not cut"
    for options in (None, whole):
        refuses(cut, helpers.get_model_state_dict, model, options=options)
        refuses(cut, helpers.get_state_dict, fsdp, optimizer, options=options)
        refuses(cut, helpers.get_optimizer_state_dict, model, optimizer, options=options)
    refuses(cut, helpers.set_model_state_dict, model, model.state_dict())
    refuses(cut, dcp.save, {"app": App(model, optimizer)}, checkpoint_id=folder)
    assert not (out / "dcp").exists()


def test_shards_are_refused(tmp_path: Path) -> None:
    launch(refused, 4, tmp_path, threads=1, timeout_s=120.0)


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
    assert not list(tmp_path.iterdir())
