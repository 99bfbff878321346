"""Transformers models loaded by slices, and driven by pyparallel's generate()."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pyparallel.checkpoint.source import CheckpointError, SafetensorsCheckpoint
from pyparallel.cut.shard import Sharding
from pyparallel.decoding.generate import generate
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.hugging_face import load_hugging_face
from pyparallel.models.load import load
from pyparallel.models.parallelize import named_shardings
from pyparallel.models.transformers_decoder import TransformersDecoder
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import assert_equal
from tests.models.test_parallelize import on_ranks
from tests.transformers_models import GENERATES, build, inputs

NAMES = ("llama tied", "gpt2", "gpt_neox", "bert", "gemma2", "gemma3", "cohere", "phi3", "granite")
PROMPTS = ([5, 17, 3, 42, 9, 11, 30], [7, 2, 51])


class Recording(SafetensorsCheckpoint):
    """Counts what is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.bytes = 0

    def read(
        self, name: str, sharding: Sharding, rank: int, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        value = super().read(name, sharding, rank, dtype=dtype)
        self.bytes += value.numel() * value.itemsize
        return value


def attention_of(name: str) -> str:
    return "eager" if name == "gemma2" else "sdpa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        build(name, attention_of(name)).save_pretrained(root / name)
    return root


def check_slices(mesh: Mesh, folder: Path) -> None:
    for name in NAMES:
        dense = build(name, attention_of(name))
        checkpoint = Recording(folder / name)
        seen: list[tuple[int, int]] = []
        loaded = load_hugging_face(
            checkpoint, mesh, progress=lambda done, total, seen=seen: seen.append((done, total))
        )
        assert isinstance(loaded, TransformersDecoder) == (name in GENERATES), name
        model: nn.Module = loaded.model if name in GENERATES else loaded
        shardings = named_shardings(model)
        for n, p in model.named_parameters():
            part = shardings[n].split(dense.get_parameter(n).detach(), mesh.tp.rank)
            assert_equal(p.detach(), part, f"{name} {n}")
        for n, b in dense.named_buffers():
            assert_equal(model.get_buffer(n), b, f"{name} {n}")
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
        # Not a byte more than this rank's share was read, and each once.
        share = sum(p.numel() * p.itemsize for p in model.parameters())
        assert checkpoint.bytes == share, f"{name}: {checkpoint.bytes} read of {share}"
        assert seen[-1] == (share, share), name
        with torch.inference_mode():
            x = {**inputs(dense), "labels": None}
            theirs, ours = dense(**x).logits, model(**x).logits
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max()), name


def check_load(mesh: Mesh, folder: Path) -> None:
    """load() hands a family that our decoder lacks to transformers, in the dtype it is told."""
    model = load(folder / "granite", mesh, dtype=torch.bfloat16)
    assert isinstance(model, TransformersDecoder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[3, 4, 5]])).shape == (1, 3, 61)
    assert model.stop_ids == (60,)


def check_generation(mesh: Mesh, folder: Path) -> dict[str, list]:
    """Greedy tokens equal the dense model's; sampled ones are returned, to be compared over R."""
    check_load(mesh, folder)
    drawn = {}
    for name in NAMES:
        if name not in GENERATES:
            continue
        dense = build(name, attention_of(name))
        model = load_hugging_face(SafetensorsCheckpoint(folder / name), mesh)
        found = generate(model, PROMPTS, max_new_tokens=25, stop_ids=()).tokens
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            expected = dense.generate(
                torch.tensor([prompt]), max_new_tokens=25, do_sample=False, eos_token_id=None
            )
            assert tokens == expected[0, len(prompt) :].tolist(), name
        sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)
        drawn[name] = generate(
            model, PROMPTS, max_new_tokens=12, stop_ids=(), sampling=sampling
        ).tokens
    return drawn


def test_reads_its_slices_only(folder: Path) -> None:
    on_ranks(check_slices, 3, folder)


def test_generates_as_dense_and_samples_alike_at_any_number_of_ranks(folder: Path) -> None:
    results = [result for ranks in (1, 2) for result in on_ranks(check_generation, ranks, folder)]
    assert all(result == results[0] for result in results)


def rewritten(folder: Path, target: Path, change) -> SafetensorsCheckpoint:
    """A copy of a checkpoint whose tensors went through ``change``."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return SafetensorsCheckpoint(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}),
            "model.layers.7.mlp.up_proj.weight is not one of a GraniteForCausalLM",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(35)}),
            r"model.norm.weight has shape \(35,\), expected \(36,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(folder: Path, tmp_path: Path, change, message: str) -> None:
    checkpoint = rewritten(folder / "granite", tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message):
        load_hugging_face(checkpoint, init_mesh())


def test_names_of_a_bare_base_model(folder: Path, tmp_path: Path) -> None:
    """GPT-2's own checkpoint lacks the model's prefix, and has old buffers."""

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

    checkpoint = rewritten(folder / "gpt2", tmp_path / "bare", strip)
    model = load_hugging_face(checkpoint, init_mesh()).model
    assert_equal(
        model.transformer.wte.weight.detach(),
        build("gpt2").transformer.wte.weight.detach(),
        "embedding",
    )


def test_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    checkpoint = rewritten(folder / "granite", tmp_path / "unknown", lambda tensors: None)
    config = json.loads((tmp_path / "unknown" / "config.json").read_text())
    config["architectures"] = ["GraniteForNothing"]
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'granite' with the architecture 'GraniteForNothing'"):
        load_hugging_face(checkpoint, init_mesh())
