"""load and generate with rotary frequencies that are stretched, or depend on a call's length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pyparallel import backend
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.layers import RotaryEmbedding
from pyparallel.layers.rope_scaling import scaling_of
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from tests.transformers_models import build

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 9.0],
}
# Name: (family, changes of its config).
CASES = {
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "dynamic": (
        "qwen2",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "longrope": (
        "llama",
        {"rope_parameters": {**LONG, "original_max_position_embeddings": 16}},
    ),
    "phi3": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
}
# Below, across and beyond the trained length of 16.
PROMPTS = [[5, 9, 2, 40, 33, 7, 8, 21, 30, 31, 4, 6], [11, 12, 13], list(range(20, 41))]
NEW = 9


def truth(folder: Path) -> list[list[int]]:
    """Each prompt's tokens by a new transformers model: one keeps its longest call's frequencies."""
    tokens = []
    for prompt in PROMPTS:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )
        tokens.append(made[0, len(prompt) :].tolist())
    return tokens


def answer(sizes: dict[str, int], folder: str, name: str | None) -> tuple[list[list[int]], list]:
    mesh = init_mesh(**sizes)
    model = load(folder, mesh)
    # A rank of cp needs a token of every prompt.
    prompts = PROMPTS if sizes.get("cp", 1) == 1 else [PROMPTS[0], PROMPTS[2]]
    with backend.use(name) if name else torch.no_grad():
        made = generate(model, prompts, max_new_tokens=NEW, stop_ids=[], replicas=mesh.dp)
    return made.tokens, prompts


@pytest.mark.parametrize("name", CASES)
def test_tokens_beyond_the_trained_length(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    model = build(family, **changes)
    model.save_pretrained(tmp_path)
    expected = truth(tmp_path)
    by_prompt = dict(zip(map(tuple, PROMPTS), expected, strict=True))
    meshes = [({"tp": 2}, None), ({"tp": 1}, "torch"), ({"dp": 2}, None)]
    if family != "phi3":
        meshes += [({"pp": 2}, None), ({"cp": 2}, None), ({"tp": 3}, None)]
    for sizes, kind in meshes:
        ranks = next(iter(sizes.values()))
        for tokens, prompts in launch(answer, ranks, sizes, str(tmp_path), kind, threads=1):
            assert tokens == [by_prompt[tuple(p)] for p in prompts], f"{name} {sizes} {kind}"


@pytest.mark.parametrize(
    "given",
    [
        {"rope_type": "yarn", "factor": 8.0},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2},
        {"rope_type": "yarn", "factor": 2.0, "truncate": False, "beta_fast": 8, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.7},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 9 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_angles_are_those_of_transformers(given: dict) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    given = {"rope_theta": 5000.0, **given}
    for last in (30, 63, 64, 200, 511):
        config = transformers.LlamaConfig(
            hidden_size=32,
            num_attention_heads=2,
            max_position_embeddings=128,
            rope_parameters=given,
        )
        positions = torch.tensor([[0, 1, 5, last]])
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
        rotary = RotaryEmbedding(16, 5000.0, scaling_of(given, {}, 128))
        ours = rotary(positions)
        for actual, expected in zip(ours, (cos, sin), strict=True):
            # Angles up to 511 in fp32.
            torch.testing.assert_close(actual, expected[..., :8], rtol=0, atol=511 * 2.0**-21)
        # A part of the call, and the table of a sequence that grows.
        part = rotary(positions[:, :2], last + 1)
        for actual, expected in zip(part, ours, strict=True):
            assert torch.equal(actual, expected[:, :2])
        for actual, expected in zip(rotary.table(last + 1, last + 1), ours, strict=True):
            assert torch.equal(actual[positions[0]], expected[0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope long_factor: expected a list"),
        ({"rope_type": "dynamic"}, "rope factor: expected a number above 0, got None"),
        ({"rope_type": "yarn", "factor": -1.0}, "rope factor: expected a number above 0, got -1.0"),
        ({"rope_type": "spiral"}, "rope_type: expected .* got 'spiral'"),
    ],
)
def test_what_is_no_scaling(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scaling_of(given, {}, 64)
