"""Ranks that would part ways: other weights, other inputs, other random states."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.agreement import checksum
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from tests.transformers_models import build

IDS = torch.tensor([[5, 9, 2, 40, 33, 7]])


def classify(sizes: dict[str, int]) -> tuple[float, float, list[str]]:
    """The loss of a classifier whose head each rank made by itself; rank 0's own dense loss."""
    mesh = init_mesh(**sizes)
    model = build("bert classes")
    torch.manual_seed(mesh.world.rank)
    with torch.no_grad():
        model.classifier.weight.normal_()
    labels = torch.tensor([1])
    with torch.no_grad():
        dense = model(input_ids=IDS, labels=labels).loss.item()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = parallelize(model, mesh)
        loss = model(input_ids=IDS, labels=labels).loss.item()
    return loss, dense, [str(w.message) for w in caught if "parallelize" in str(w.message)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_new_head_is_the_first_ranks(ranks: int) -> None:
    found = launch(classify, ranks, {"tp": ranks}, threads=1)
    assert all(loss == pytest.approx(found[0][1], rel=1e-5) for loss, _, _ in found)
    assert len({dense for _, dense, _ in found}) == ranks
    assert all(
        len(said) == 1 and said[0].startswith("parallelize: classifier.weight ")
        for *_, said in found
    )


def other_models() -> None:
    mesh = init_mesh(tp=2)
    model = build("llama", num_hidden_layers=1 + mesh.tp.rank)
    with pytest.raises(
        ValueError, match=r"model: expected the same on all ranks .* on 1 than on 0"
    ):
        parallelize(model, mesh)


def test_other_models() -> None:
    launch(other_models, 2, threads=1)


def sampled(sizes: dict[str, int]) -> list:
    mesh = init_mesh(**sizes)
    model = parallelize(build("llama"), mesh)
    torch.manual_seed(100 + mesh.world.rank)
    return model.generate(IDS, max_new_tokens=12, do_sample=True, eos_token_id=None).tolist()


def test_transformers_samples_alike() -> None:
    dense = build("llama")
    torch.manual_seed(100)
    options = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None}
    expected = dense.generate(IDS, **options).tolist()
    for tokens in launch(sampled, 2, {"tp": 2}, threads=1):
        assert tokens == expected


def other_inputs(folder: str) -> None:
    mesh = init_mesh(tp=2)
    ids = IDS + mesh.tp.rank
    dense = build("llama")
    model = parallelize(build("llama"), mesh)
    assert type(model).__name__ == type(dense).__name__ and isinstance(model, type(dense))
    with pytest.raises(ValueError, match=r"inputs: expected the same .* on 1 than on 0"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"inputs: expected the same .* on 1 than on 0"):
        model.generate(ids, max_new_tokens=2)
    model(input_ids=IDS)
    own = load(folder, mesh)
    for prompts, count in ((ids.tolist(), 3), (IDS.tolist(), 3 + mesh.tp.rank)):
        with pytest.raises(ValueError, match=r"prompts and options: expected the same .* on 1"):
            generate(own, prompts, max_new_tokens=count)
    generate(own, IDS.tolist(), max_new_tokens=3)


def test_other_inputs(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    launch(other_inputs, 2, str(tmp_path), threads=1)


def test_checksums() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        x = (torch.randn(700_001, generator=generator) * 9).to(dtype)
        truth = int(checksum(x))
        assert int(checksum(x.clone())) == truth
        assert int(checksum(x[3:])) == int(checksum(x[3:].clone()))
        for place in (0, 5, 300_000, 700_000):
            y = x.clone()
            y[place] = ~y[place] if dtype == torch.bool else y[place] + 1
            assert int(checksum(y)) != truth, (dtype, place)
        if dtype != torch.bool:
            assert int(checksum(x.flip(0))) != truth
    assert int(checksum(torch.zeros(0))) != int(checksum(torch.zeros(1)))
