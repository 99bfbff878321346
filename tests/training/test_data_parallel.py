"""Data parallel on DDP and FSDP2, beside tp, sp and cp: a whole training step is the dense model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import all_gather_raw, all_reduce
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import assert_equal, poisoned_empty
from pyparallel.training.data import data_parallel
from pyparallel.training.grad_norm import clip_grad_norm_, grad_norm
from pyparallel.training.loss import count_targets, cross_entropy
from tests.training.training_truth import (
    FAMILIES,
    LENGTH,
    Truth,
    check_grads,
    check_loss,
    check_norm,
    check_stepped,
    dense,
    optimizer_of,
    own_rows,
    targets,
    text,
    truth_of,
)

Loss = Callable[[nn.Module], Tensor]
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


def own_model(folder: str, mesh: Mesh, sequence: bool) -> tuple[nn.Module, Loss]:
    """The library's decoder; with sp its logits stay cut over tp."""
    model = load(folder, mesh, sequence_parallel=sequence).train()
    model.head.gather_output = not sequence

    def loss_of(wrapped: nn.Module) -> Tensor:
        ids, wanted = own_rows(text(), mesh), own_rows(targets(), mesh)
        if isinstance(model, ContextDecoder):
            wanted = model.shards(LENGTH).split(wanted)
        return cross_entropy(wrapped(ids), wanted, mesh, vocab_size=61 if sequence else None)

    return model, loss_of


def parallelized(family: str, mesh: Mesh, sequence: bool) -> tuple[nn.Module, Loss]:
    """The transformers model, and its own loss."""
    model = parallelize(dense(family), mesh, sequence_parallel=sequence).train()

    def loss_of(wrapped: nn.Module) -> Tensor:
        ids, wanted = own_rows(text(), mesh), own_rows(targets(), mesh)
        labels = torch.cat([torch.full((len(ids), 1), -100), wanted[:, :-1]], 1)
        count = count_targets(labels[:, 1:], mesh, whole=True)
        loss = wrapped(input_ids=ids, labels=labels, num_items_in_batch=count, use_cache=False).loss
        # This replica's share; the sum over dp is the mean.
        return all_reduce(loss, mesh.dp)

    return model, loss_of


def check_step(
    mesh: Mesh, engine: str, inner: nn.Module, loss_of: Loss, truth: Truth, what: str
) -> None:
    model = data_parallel(
        inner, mesh, engine=engine, bucket_cap_mb=0.01 if engine == "ddp" else None
    )
    loss = loss_of(model)
    check_loss(loss.detach(), truth, mesh, what)
    loss.backward()
    check_grads(inner, truth, mesh, what)
    for order in truth.norms:
        check_norm(grad_norm(model, mesh, norm_type=order), order, truth, mesh, what)
    norm = clip_grad_norm_(model, truth.clipped, mesh)
    check_norm(norm, 2.0, truth, mesh, what)
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
                what = f"{family} {engine} {mesh} sp={sequence} rank={mesh.world.rank}"
                with poisoned_empty():
                    check_step(mesh, engine, *own_model(folder, mesh, sequence), truth, what)
    for family, engine in (("llama tied", "fsdp"), ("gpt2", "ddp")):
        what = f"transformers' {family} {engine} {mesh} rank={mesh.world.rank}"
        made = parallelized(family, mesh, tp > 1)
        with poisoned_empty():
            check_step(mesh, engine, *made, truths[family][1], what)


@pytest.mark.parametrize(("dp", "cp", "tp"), MESHES)
def test_a_step_is_the_dense_models(truths, dp: int, cp: int, tp: int) -> None:
    launch(steps, dp * cp * tp, dp, cp, tp, truths, threads=1, timeout_s=60.0)
