"""Data parallel on DDP and FSDP2, beside tp, sp and cp: a whole training step is the dense model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyparallel.collectives import all_gather_raw
from pyparallel.data import data_parallel
from pyparallel.grad_norm import clip_grad_norm_, grad_norm
from pyparallel.launch import launch
from pyparallel.loss import cross_entropy
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.load import load
from pyparallel.testing import assert_equal, poisoned_empty
from tests.training_truth import (
    FAMILIES,
    LENGTH,
    Truth,
    check_grads,
    check_stepped,
    dense,
    optimizer_of,
    targets,
    text,
    truth_of,
)

# (dp, cp, tp)
MESHES = ((2, 1, 1), (3, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2))


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Truth]]:
    found = {}
    for family in FAMILIES:
        model = dense(family)
        folder = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folder)
        found[family] = folder, truth_of(model)
    return found


def own_rows(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    return x.chunk(mesh.dp.size)[mesh.dp.rank]


def loss_of(model: nn.Module, inner: nn.Module, mesh: Mesh, *, cut: bool) -> torch.Tensor:
    """The global loss; ``cut``: of logits that are not gathered over tp."""
    ids, wanted = own_rows(text(), mesh), own_rows(targets(), mesh)
    if isinstance(inner, ContextDecoder):
        wanted = inner.shards(LENGTH).split(wanted)
    inner.head.gather_output = not cut
    return cross_entropy(model(ids), wanted, mesh, vocab_size=61 if cut else None)


def check_step(
    mesh: Mesh, engine: str, folder: str, truth: Truth, sequence: bool, what: str
) -> None:
    inner = load(folder, mesh, sequence_parallel=sequence).train()
    model = data_parallel(
        inner, mesh, engine=engine, bucket_cap_mb=0.01 if engine == "ddp" else None
    )
    loss = loss_of(model, inner, mesh, cut=sequence)
    assert abs(float(loss) - truth.loss) < 1e-5 * truth.loss, what
    loss.backward()
    check_grads(inner, truth, mesh, what)
    for order, norm in truth.norms.items():
        assert abs(float(grad_norm(model, mesh, norm_type=order)) - norm) < 1e-5 * norm, (
            what,
            order,
        )
    norm = clip_grad_norm_(model, truth.clipped, mesh)
    assert abs(float(norm) - truth.norms[2.0]) < 1e-5 * truth.norms[2.0], what
    optimizer_of(model).step()
    check_stepped(inner, truth, mesh, what)
    # The norm itself is the same bits on all ranks.
    norms = all_gather_raw(norm.unsqueeze(0), mesh.world)
    assert_equal(norms, norms[:1].expand_as(norms).contiguous(), what)


def steps(dp: int, cp: int, tp: int, truths: dict) -> None:
    mesh = init_mesh(dp=dp, cp=cp, tp=tp)
    for family, (folder, truth) in truths.items():
        for engine in ("ddp", "fsdp"):
            for sequence in (False, True) if tp > 1 else (False,):
                with poisoned_empty():
                    what = f"{family} {engine} {mesh} sp={sequence} rank={mesh.world.rank}"
                    check_step(mesh, engine, folder, truth, sequence, what)


@pytest.mark.parametrize(("dp", "cp", "tp"), MESHES)
def test_a_step_is_the_dense_models(truths, dp: int, cp: int, tp: int) -> None:
    launch(steps, dp * cp * tp, dp, cp, tp, truths, threads=1, timeout_s=60.0)
