"""DDP and FSDP2 under data_parallel(): whose weights, how many bytes, which bits, what is refused."""

from __future__ import annotations

import os
import time
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from pyparallel.comm.collectives import all_gather_raw, count_collectives
from pyparallel.launch import RankError, launch, report
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.config import from_hugging_face
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.testing import assert_equal, assert_within, dense_bound, integers
from pyparallel.training.data import data_parallel
from pyparallel.training.loss import count_targets, cross_entropy, mean_loss
from tests.orders import Exact, farthest
from tests.training.pipeline_checks import family_of
from tests.training.training_truth import own_rows, whole

CONFIG = from_hugging_face(
    {
        "model_type": "llama",
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
)


def decoder(mesh: Mesh) -> nn.Module:
    torch.manual_seed(0)
    if mesh.cp.size > 1:
        return ContextDecoder(CONFIG, group=mesh.tp, context=mesh.cp)
    return Decoder(CONFIG, group=mesh.tp)


def backward(model: nn.Module, mesh: Mesh, ids: torch.Tensor) -> None:
    """Of the sum of all logits' squares."""
    ids = own_rows(ids, mesh)
    mean_loss(model(ids).square().sum(), ids.shape[0], mesh).backward()


def counted(cp: int) -> None:
    """Each gradient travels once; FSDP gathers each layer for forward and again for backward."""
    mesh = init_mesh(dp=2, cp=cp)
    ids = integers(4, 8, seed=1, dtype=torch.long, low=0, high=60)
    own_bytes = 4 * sum(p.numel() for p in decoder(mesh).parameters())
    for engine in ("ddp", "fsdp"):
        model = data_parallel(decoder(mesh), mesh, engine=engine)
        loss = mean_loss(model(own_rows(ids, mesh)).square().sum(), 4, mesh)
        with count_collectives() as counts:
            loss.backward()
        if engine == "ddp":
            assert counts["all_reduce", "bytes"] == own_bytes
            assert counts["reduce_scatter"] == 0
            continue
        assert counts["all_reduce"] == 0
        # Two layers and the rest; an axis is padded to a multiple of the ranks.
        assert counts["reduce_scatter"] == 3
        # The rest keeps its parameters from forward on.
        assert counts["all_gather"] == 2
        sent = counts["reduce_scatter", "bytes"]
        assert own_bytes <= sent < 1.1 * own_bytes


@pytest.mark.parametrize("cp", [1, 2])
def test_every_gradient_travels_once(cp: int) -> None:
    launch(counted, 2 * cp, cp, threads=1, timeout_s=60.0)


def same_bits() -> None:
    """What is replicated over tp has one value there, though its bucket differs; with 3 terms a sum's
    order matters."""
    mesh = init_mesh(dp=3, tp=2)
    ids = integers(6, 8, seed=2, dtype=torch.long, low=0, high=60)
    for engine in ("ddp", "fsdp"):
        inner = decoder(mesh)
        model = data_parallel(inner, mesh, engine=engine, **(_buckets(engine)))
        backward(model, mesh, ids)
        replicated = [p for n, p in inner.named_parameters() if "norm" in n]
        assert len(replicated) == 5
        own = torch.cat([whole(p.grad) for p in replicated])
        assert float(own.abs().min()) > 0
        everyone = all_gather_raw(own.unsqueeze(0), mesh.world)
        assert_equal(everyone, everyone[:1].expand_as(everyone).contiguous(), engine)


def _buckets(engine: str) -> dict[str, float]:
    return {"bucket_cap_mb": 0.01} if engine == "ddp" else {}


def test_replicated_parameters_keep_the_same_bits() -> None:
    launch(same_bits, 6, threads=1, timeout_s=60.0)


def generic() -> None:
    mesh = init_mesh(dp=2)
    rank = mesh.dp.rank
    check_first_ranks_weights(mesh)
    check_accumulation(mesh)
    # Frozen and unused parameters; none that is trained.
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].requires_grad_(False)
    used = ("a", "b", "c") if rank == 0 else ("b", "c")
    model.forward = lambda x: sum(model[name](x) for name in used)
    wrapped = data_parallel(model, mesh, find_unused_parameters=True)
    x = integers(2, 3, seed=rank).requires_grad_()
    wrapped(x).sum().backward()
    # Rank 1 did not use it: the sum is rank 0's part, on both.
    grads = all_gather_raw(model["a"].weight.grad.unsqueeze(0).contiguous(), mesh.dp)
    assert_equal(grads[0], grads[1], "a")
    assert float(grads.abs().max()) > 0
    assert model["b"].weight.grad is None
    frozen = nn.Linear(3, 3).requires_grad_(False)
    assert data_parallel(frozen, mesh) is frozen
    check_losses(mesh)


def check_first_ranks_weights(mesh: Mesh) -> None:
    for engine in ("ddp", "fsdp"):
        torch.manual_seed(mesh.dp.rank)
        inner = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        inner[1].running_mean.fill_(mesh.dp.rank)
        if engine == "ddp":
            # Rows that do not lie one after another, which FSDP does not take.
            inner[0].weight = nn.Parameter(torch.randn(3, 5).t())
        data_parallel(inner, mesh, engine=engine)
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        assert_equal(whole(inner[0].bias), first[0].bias.detach(), "bias")
        weight = torch.randn(3, 5).t() if engine == "ddp" else first[0].weight.detach()
        assert_equal(whole(inner[0].weight), weight, "weight")
        assert_equal(inner[1].running_mean, torch.zeros(5), "buffer")


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the sum of all logits' squares, on one rank."""
    model.zero_grad(set_to_none=True)
    model(ids).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_accumulation(mesh: Mesh) -> None:
    """Two halves of a batch, summed once: as far from the truth as that many partial sums may be."""
    ids = integers(4, 8, seed=3, dtype=torch.long, low=0, high=60)
    dense = decoder(mesh)
    with Exact():
        exact = gradients(deepcopy(dense).double(), ids)
    rounded = farthest(partial(gradients, dense, ids), exact)
    truth = {str(torch.float32): rounded, str(torch.float64): exact}
    for engine in ("ddp", "fsdp"):
        models = [decoder(mesh), decoder(mesh)]
        at_once, in_parts = (data_parallel(m, mesh, engine=engine) for m in models)
        rows = own_rows(ids, mesh)
        at_once(rows).square().sum().backward()
        with count_collectives() as counts:
            if engine == "ddp":
                with in_parts.no_sync():
                    in_parts(rows[:1]).square().sum().backward()
            else:
                in_parts.set_requires_gradient_sync(False)
                in_parts(rows[:1]).square().sum().backward()
                in_parts.set_requires_gradient_sync(True)
            assert counts["all_reduce"] == counts["reduce_scatter"] == 0
        in_parts(rows[1:]).square().sum().backward()
        for model, parts in zip(models, (mesh.dp.size, 2 * mesh.dp.size), strict=True):
            for name, parameter in model.named_parameters():
                what = f"{engine}, {parts} parts, {name}"
                bound = max(dense_bound(*pair, parts, what) for pair in family_of(name, truth))
                assert_within(whole(parameter.grad), exact[name], bound, what)


def check_losses(mesh: Mesh) -> None:
    """The mean over all targets, not of the ranks' means."""
    logits = integers(4, 3, 7, seed=5, low=-3, high=3)
    wanted = integers(4, 3, seed=6, dtype=torch.long, low=0, high=6)
    wanted[:2, 1:] = -100
    dense = logits.clone().requires_grad_()
    truth = nn.functional.cross_entropy(dense.flatten(0, 1), wanted.flatten(), label_smoothing=0.1)
    truth.backward()
    own, targets = own_rows(logits, mesh).clone().requires_grad_(), own_rows(wanted, mesh)
    loss = cross_entropy(own, targets, mesh, label_smoothing=0.1)
    loss.backward()
    torch.testing.assert_close(loss, truth.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(own.grad, own_rows(dense.grad, mesh), rtol=1e-5, atol=1e-7)
    count = count_targets(targets, mesh)
    assert int(count) == 8
    parts = [
        cross_entropy(own[i : i + 1], targets[i : i + 1], mesh, count=count, label_smoothing=0.1)
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), truth.detach(), rtol=1e-6, atol=0)
    for call in (
        lambda: mean_loss(logits, 3, mesh),
        lambda: cross_entropy(logits, wanted[:2], mesh),
        lambda: cross_entropy(logits, wanted, mesh, z_loss=0.1),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_any_module_and_any_loss() -> None:
    launch(generic, 2, threads=1, timeout_s=60.0)


class Tied(nn.Module):
    """A layer's weight outside of the layers too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 3)
        self.head.weight = self.layers[1].weight


def refusals() -> list[str]:
    mesh = init_mesh(dp=2)
    wrapped = data_parallel(nn.Linear(3, 3), mesh)
    sharded = data_parallel(nn.Linear(3, 3), mesh, engine="fsdp")
    said = []
    for model, options in (
        (nn.Linear(3, 3), {"engine": "zero"}),
        (nn.Linear(3, 3), {"engine": "fsdp", "bucket_cap_mb": 1.0}),
        (nn.Linear(3, 3), {"reshard_after_forward": False}),
        (wrapped, {}),
        (sharded, {"engine": "fsdp"}),
        (nn.Linear(3, 3, device="meta"), {}),
        (Tied(), {"engine": "fsdp"}),
        (nn.Linear(3, 3 + mesh.dp.rank), {}),
    ):
        with pytest.raises(ValueError) as error:
            data_parallel(model, mesh, **options)
        said.append(str(error.value))
    data_parallel(Tied(), mesh)
    return said


def test_bad_input_is_one_clear_line() -> None:
    expected = (
        "engine: expected one of ddp, fsdp, got 'zero'",
        "bucket_cap_mb: expected its default with engine='fsdp'",
        "reshard_after_forward: expected its default with engine='ddp'",
        "got a DistributedDataParallel; call data_parallel once",
        "got a FSDPLinear; call data_parallel once",
        "weight: expected plain memory, got a parameter without memory; load the weights first",
        "head.weight: tied to layers.1.weight, in another layer, which fsdp gathers apart",
        "expected the same parameters on all ranks of dp x cp, got others on 1 than on 0",
    )
    for said in launch(refusals, 2, threads=1, timeout_s=60.0):
        assert len(said) == len(expected)
        for words, line in zip(expected, said, strict=True):
            assert words in line
            assert "\n" not in line


def dies(engine: str) -> None:
    mesh = init_mesh(dp=2)
    model = data_parallel(decoder(mesh), mesh, engine=engine)
    ids = integers(2, 8, seed=1, dtype=torch.long, low=0, high=60)
    loss = model(own_rows(ids, mesh)).square().sum()
    if mesh.dp.rank == 1:
        os._exit(3)
    try:
        loss.backward()
    except RuntimeError as error:
        report(str(error))
        raise


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_dead_replica_ends_backward(engine: str) -> None:
    heard: list[str] = []
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2"):
        launch(dies, 2, engine, threads=1, on_report=lambda rank, text: heard.append(text))
    assert time.monotonic() - started < 60
    assert len(heard) == 1 and "'data'" in heard[0] and "rank 1" in heard[0]
