"""Losses that are means of a rank's own tokens: ``average=True`` gives torch's DDP's gradients; where
it, or ``whole=True``, can't be meant, one line says so.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pyparallel.comm.collectives import count_collectives
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.testing import assert_equal, integers
from pyparallel.training.data import data_parallel
from pyparallel.training.loss import count_targets
from pyparallel.training.pipeline import Pipeline
from tests.training.training_truth import own_rows, whole
from tests.transformers_models import build


def averages(tp: int) -> None:
    """Small integers, means of powers of two of them: every gradient is exact."""
    mesh = init_mesh(dp=2, tp=tp)
    x, wanted = integers(8, 3, seed=3), integers(8, 2, seed=4)
    dense = nn.Linear(3, 2)
    with torch.no_grad():
        dense.weight.copy_(integers(2, 3, seed=1))
        dense.bias.copy_(integers(2, seed=2))
    models = {
        engine: data_parallel(deepcopy(dense), mesh, engine=engine, average=True)
        for engine in ("ddp", "fsdp")
    }
    group = mesh.data_mesh.get_group()
    models["torch"] = DistributedDataParallel(deepcopy(dense), process_group=group)
    summed = data_parallel(deepcopy(dense), mesh)
    F.mse_loss(dense(x), wanted).backward()
    for what, model in {**models, "summed": summed}.items():
        # Twice: a divided bucket is not divided again.
        for _ in range(2):
            model.zero_grad()
            F.mse_loss(model(own_rows(x, mesh)), own_rows(wanted, mesh)).backward()
        times = 2.0 if what == "summed" else 1.0
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert_equal(whole(ours.grad), times * theirs.grad, what)


@pytest.mark.parametrize("tp", [1, 2])
def test_average_is_torchs_own(tp: int) -> None:
    launch(averages, 2 * tp, tp, threads=1, timeout_s=60.0)


def refusals(folder: str) -> None:
    mesh = init_mesh(cp=2)
    with pytest.raises(ValueError, match=r"average: expected False over cp=2 .* use .*mean_loss"):
        data_parallel(nn.Linear(3, 3), mesh, average=True)
    mesh = init_mesh(pp=1, dp=2)
    for engine in ("ddp", "fsdp"):
        stage = data_parallel(load(folder, mesh).train(), mesh, engine=engine, average=True)
        with pytest.raises(ValueError, match=r"stages: expected data_parallel.* average=False"):
            Pipeline(stage, mesh, num_microbatches=1)


def test_average_is_refused_where_gradients_are_parts(tmp_path) -> None:
    build("llama").save_pretrained(tmp_path)
    launch(refusals, 2, str(tmp_path), threads=1, timeout_s=60.0)


def counted(dp: int, cp: int) -> None:
    mesh = init_mesh(dp=dp, cp=cp)
    batch = integers(2 * dp, 8, seed=5, dtype=torch.long, low=0, high=9)
    batch[0, 3:] = -100
    own = own_rows(batch, mesh)
    part = own.chunk(cp, 1)[mesh.cp.rank]
    expected = int((batch != -100).sum())
    assert int(count_targets(part, mesh)) == expected
    with count_collectives() as counts:
        assert int(count_targets(own, mesh, whole=True)) == expected
    asked = {n: c for n, c in counts.items() if isinstance(n, str)}
    assert asked == {n: 1 for n, size in (("all_reduce", dp), ("all_gather", cp)) if size > 1}
    if cp == 1:
        return
    # Parts taken for whole sequences would count as one rank's alone.
    with pytest.raises(RuntimeError, match=r"whole: expected False for targets .* cut over cp=2"):
        count_targets(part, mesh, whole=True)


@pytest.mark.parametrize(("dp", "cp"), [(2, 1), (1, 2), (2, 2)])
def test_whole_sequences_are_counted_once_and_parts_are_no_whole_ones(dp: int, cp: int) -> None:
    launch(counted, dp * cp, dp, cp, threads=1, timeout_s=60.0)
