"""load(...).train() is transformers' model in training: what it drops, and the padding's row."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.decoding.cpu_decoder import reason_against
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.testing import assert_as_dense, poisoned_empty
from pyparallel.training.pipeline import Pipeline
from tests.orders import Exact, farthest
from tests.transformers_models import build

IDS = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(1))
TARGETS = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
# What drops everything drops the same wherever it is drawn.
ALL = {
    "embedding": ("gpt2", {"embd_pdrop": 1.0}),
    "weights": ("gpt2", {"attn_pdrop": 1.0}),
    "behind": ("gpt2", {"resid_pdrop": 1.0}),
    "neox": ("gpt_neox", {"hidden_dropout": 1.0}),
    "neox weights": ("gpt_neox", {"attention_dropout": 1.0}),
    "llama": ("llama", {"attention_dropout": 1.0}),
    "qwen3": ("qwen3", {"attention_dropout": 1.0}),
}


def logits_of(folders: list[str]) -> list[Tensor]:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    with poisoned_empty():
        return [load(folder, mesh).train()(IDS).detach() for folder in folders]


def test_all_or_nothing(tmp_path: Path) -> None:
    expected = []
    for name, (family, changes) in ALL.items():
        model = build(family, "eager", **changes)
        model.save_pretrained(tmp_path / name)
        kept = model(IDS).logits.detach()
        with torch.no_grad():
            with Exact():
                exact = deepcopy(model).double().train()(IDS).logits
            plain = farthest(lambda m=model: m.train()(IDS).logits, exact)
        assert float((kept - plain).abs().max()) > 0.1, name
        expected.append((plain, exact))
    folders = [str(tmp_path / name) for name in ALL]
    for ranks in (1, 2, 3):
        for found in launch(logits_of, ranks, folders, threads=1):
            for name, ours, pair in zip(ALL, found, expected, strict=True):
                assert_as_dense(ours, *pair, ranks, name)


def dropped(sizes: dict[str, int], folder: str, sequence: bool, recompute: str) -> tuple:
    """The losses of two steps and the gradient of one norm, of the whole model."""
    mesh = init_mesh(**sizes)
    model = load(folder, mesh, sequence_parallel=sequence, recompute=recompute).train()
    if mesh.world.size == 1:
        assert "drops" in reason_against(model)
    torch.manual_seed(5)
    if mesh.pp.size > 1:
        pipeline = Pipeline(model, mesh, num_microbatches=1, schedule="gpipe")
        losses = [float(pipeline.step(IDS, TARGETS)) for _ in range(2)]
        return tuple(losses)
    losses = []
    for _ in range(2):
        logits = model(IDS)
        if mesh.cp.size > 1:
            shards = model.shards(IDS.shape[1])
            logits = all_gather_raw(logits.detach(), mesh.cp, dim=1, sizes=shards.sizes)
            logits = logits[:, shards.dense_order()]
        loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
        if mesh.cp.size == 1:
            loss.backward()
        losses.append(float(loss.detach()))
    return tuple(losses)


def check_masks(folder: Path, cases: list) -> None:
    found = {}
    for sizes, sequence, recompute in cases:
        ranks = 1
        for size in sizes.values():
            ranks *= size
        for losses in launch(dropped, ranks, sizes, str(folder), sequence, recompute, threads=1):
            found[str((sizes, sequence, recompute))] = losses
    first = next(iter(found.values()))
    assert first[0] != pytest.approx(first[1], rel=1e-3)
    for name, losses in found.items():
        assert losses == pytest.approx(first, rel=1e-5), name


def test_masks_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    rates = {"embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.4}
    build("gpt2", **rates).save_pretrained(tmp_path / "all")
    cases = [
        ({"tp": 1}, False, "none"),
        ({"tp": 2}, False, "attention"),
        ({"tp": 3}, True, "layers"),
        ({"pp": 2}, False, "none"),
    ]
    check_masks(tmp_path / "all", cases)
    build("gpt2", **{**rates, "attn_pdrop": 0.0}).save_pretrained(tmp_path / "cp")
    cases = [
        ({"tp": 1}, False, "none"),
        ({"cp": 2}, False, "none"),
        ({"cp": 2, "tp": 2}, True, "none"),
    ]
    check_masks(tmp_path / "cp", cases)


def no_weights_over_cp(folder: str) -> None:
    model = load(folder, init_mesh(cp=2))
    model(IDS)
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 in training .* got 0.5"):
        model.train()(IDS)


def test_weights_are_not_dropped_over_cp(tmp_path: Path) -> None:
    build("llama", attention_dropout=0.5).save_pretrained(tmp_path)
    launch(no_weights_over_cp, 2, str(tmp_path), threads=1)


def gradients(folders: list[str]) -> list[dict[str, Tensor]]:
    mesh, found = init_mesh(tp=torch.distributed.get_world_size()), []
    for folder in folders:
        model = load(folder, mesh).train()
        loss = F.cross_entropy(model(IDS).flatten(0, 1), TARGETS.flatten())
        loss.backward()
        name = "embedding.weight"
        found.append(model.get_parameter(name).grad)
    return found


@pytest.mark.parametrize("padding", [int(IDS[0, 3]), -1])
def test_the_row_of_padding(padding: int, tmp_path: Path) -> None:
    expected = []
    for name, tied in (("untied", False), ("tied", True)):
        model = build("llama", pad_token_id=padding, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / name)
        with Exact():
            exact = table_gradient(deepcopy(model).double())
        expected.append((farthest(partial(table_gradient, model), exact), exact))
    assert not expected[0][1][padding].any() and expected[1][1][padding].any()
    folders = [str(tmp_path / name) for name in ("untied", "tied")]
    for rank, found in enumerate(launch(gradients, 2, folders, threads=1)):
        part = slice(0, 31) if rank == 0 else slice(31, None)
        for ours, pair in zip(found, expected, strict=True):
            assert_as_dense(ours, *pair, 2, f"rank {rank}", part=lambda t, part=part: t[part])
            row = padding - part.start
            if ours is found[0] and padding >= 0 and 0 <= row < len(ours):
                assert not ours[row].any()


def table_gradient(model: torch.nn.Module) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(IDS).logits.flatten(0, 1), TARGETS.flatten())
    loss.backward()
    return model.model.embed_tokens.weight.grad
